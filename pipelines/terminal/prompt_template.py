"""`--prompt-template`: a model is served with another chat template than the one exported with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from xtuner_core import registry
from xtuner_core.data import templates
from xtuner_core.errors import RecipeError

OLD_NAMES = {"internlm2_chat": "internlm2", "llama3_chat": "llama3", "qwen_chat": "chatml"}
"""The names that prompt templates had in XTuner up to 0.2. (Its qwen_chat put one more newline in front, which Qwen's own did not.)"""
GONE = (
    *("baichuan2_chat", "baichuan_chat", "chatglm2", "chatglm3", "code_llama_chat", "cohere_chat", "deepseek_coder", "deepseek_moe"),
    *("deepseek_v2", "deepseekcoder", "default", "internlm_chat", "llama2_chat", "minicpm", "minicpm3", "mixtral", "moss_sft"),
    *("orca_math", "phi3_chat", "plain", "vicuna", "wizardcoder", "wizardlm", "zephyr"),
)
"""Old names of templates that are not shipped here."""
_REPLACED = ("chat_template.jinja", "tokenizer_config.json", "generation_config.json")


def template_name(name: str) -> str:
    """The module of xtuner_core/data/templates that a name, of today or of old, means.

    Raises:
        RecipeError: there is none; the message lists those there are.
    """
    known = [*registry.names(templates), *OLD_NAMES]
    if name in GONE:
        raise RecipeError(
            f"--prompt-template {name}: this old template is not shipped. Leave the option out to use the model's own template, "
            f"or choose one of {', '.join(sorted(known))}."
        )
    if name not in known:
        raise RecipeError(f"--prompt-template {name}: unknown; known are {', '.join(sorted(known))}.")
    return OLD_NAMES.get(name, name)


@contextmanager
def with_template(model_dir: Path, name: str | None, say: Callable[[str], None]) -> Iterator[Path]:
    """A folder that holds the model with template `name`: the model's own folder where that makes no difference, else one of links.

    Token ids of small conversations decide whether there is a difference; it is told.

    Raises:
        RecipeError: the tokenizer has not the template's control tokens, or only models that bring the template can have it.
    """
    if name is None:
        yield model_dir
        return
    from xtuner_core.data.render import difference_from_own

    chosen = template_name(name)
    difference = difference_from_own(model_dir, chosen)
    if difference is None:
        yield model_dir
        return
    _require_fitting(model_dir, chosen)
    say(f"note: --prompt-template {name} is not the template exported with this model: {difference}")
    with TemporaryDirectory(prefix="xtuner-template-") as folder:
        served = Path(folder, "model")
        _lay_out(model_dir.resolve(), served, chosen)
        yield served


def _require_fitting(model_dir: Path, name: str) -> None:
    from xtuner_core.data.render import control_tokens, find_template
    from xtuner_core.data.tokenize import load_tokenizer

    missing = [token for token in control_tokens(name) if token not in load_tokenizer(model_dir).control]
    if missing:
        raise RecipeError(f"{model_dir}: its tokenizer has no {', '.join(missing)}, so template {name} cannot be used with it.")
    if find_template(name).JINJA is None:
        raise RecipeError(f"template {name} exists only in models that bring it; {model_dir} brings another one.")


def _lay_out(model_dir: Path, served: Path, name: str) -> None:
    """Links to the model's files; the template, and what ends its turns, are new."""
    from xtuner_core.checkpoint.hf import complete_generation_config
    from xtuner_core.data.render import find_template
    from xtuner_core.data.tokenize import load_tokenizer

    template = find_template(name)
    served.mkdir()
    for item in model_dir.iterdir():
        if item.name not in _REPLACED:
            (served / item.name).symlink_to(item)
    for file in (model_dir / "tokenizer_config.json", model_dir / "generation_config.json"):
        if file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            config.pop("chat_template", None)
            (served / file.name).write_text(json.dumps(config), encoding="utf-8")
    (served / "chat_template.jinja").write_text(template.JINJA or "", encoding="utf-8")
    complete_generation_config(served, [load_tokenizer(model_dir).control[template.STOP]])
