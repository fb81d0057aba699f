"""Write the ticket-routing set: `python data/tickets/make.py`; `--check` only compares and exits 1 on a difference.

The wording is in phrases.json, the rules are `route`, the mixture is `cases`. Standard library only, no clock:
the same bytes on every machine. `random.Random.random` alone is used, the one method whose sequence Python promises to keep.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

HERE = Path(__file__).resolve().parent
PHRASES = json.loads((HERE / "phrases.json").read_text(encoding="utf-8"))
QUEUES = {
    "billing": "Copper Ledger",
    "repair": "Wrench Bay",
    "delivery": "Harbor Dispatch",
    "account": "Keyring Desk",
    "theft": "Magpie Watch",
    "cancel": "Farewell Table",
    "injury": "Amber Room",
}
CONCIERGE, PARTNER = "Velvet Lounge", "Birch Office"
ALL_QUEUES = (*QUEUES.values(), CONCIERGE, PARTNER)
INSTRUCTION = "Name the queue."
"""All that the model is told; the template's own default system prompt would cost more tokens than the ticket."""
TOP_PLAN, OTHER_PLANS = "Orchid", ("Clover", "Fern", "Maple")
NORDICS, OTHER_REGIONS = "Nordics", ("Iberia", "Alps", "Benelux", "Isles")
COUNTS = {
    "train": {"topic": 80, "concierge": 128, "nordic": 114},
    "heldout": {"topic": 20, "concierge": 32, "nordic": 28},
}
SEEDS = {"train": 11, "heldout": 12}
DISTRACTED, FRAMED, MISTYPED = 0.2, 0.5, 0.05
NEAR_MISS = {"train": 0.3, "heldout": 0.15}

Option = TypeVar("Option")


@dataclass(frozen=True, slots=True)
class Case:
    """What a ticket is about, before it has words; `plan` or `region` is None where the customer names none."""

    topic: str
    plan: str | None
    region: str | None

    @property
    def kind(self) -> str:
        """Which group of context templates can say it."""
        if self.plan and self.region:
            return "both"
        return "plan" if self.plan else "region" if self.region else "none"


@dataclass(frozen=True, slots=True)
class Ticket:
    """One worded case and the templates that its words come from."""

    case: Case
    text: str
    templates: tuple[str, ...]

    @property
    def queue(self) -> str:
        return route(self.case)

    @property
    def rule(self) -> str:
        return rule(self.case)


def rule(case: Case) -> str:
    """The rule that decides, in order of precedence."""
    if case.topic == "injury":
        return "injury"
    if case.plan == TOP_PLAN:
        return "concierge"
    if case.region == NORDICS:
        return "nordic"
    return "topic"


def route(case: Case) -> str:
    """The one right queue."""
    return {"concierge": CONCIERGE, "nordic": PARTNER}.get(rule(case), QUEUES[case.topic])


def pick(rng: Random, options: Sequence[Option]) -> Option:
    return options[int(rng.random() * len(options))]


def shuffled(rng: Random, items: Sequence[Option]) -> list[Option]:
    return [items[index] for _, index in sorted((rng.random(), index) for index in range(len(items)))]


def cases(split: str, rng: Random) -> Iterator[Case]:
    """The mixture: every topic equally often, and about 30 % decided by an override."""
    counts = COUNTS[split]
    for topic in QUEUES:
        for number in range(counts["topic"]):
            yield topic_case(topic, number, rng)
    calm = [topic for topic in QUEUES if topic != "injury"]
    for number in range(counts["concierge"]):
        region = (None, NORDICS, pick(rng, OTHER_REGIONS))[number // len(calm) % 3]
        yield Case(calm[number % len(calm)], TOP_PLAN, region)
    for number in range(counts["nordic"]):
        yield Case(calm[number % len(calm)], pick(rng, OTHER_PLANS) if number // len(calm) % 2 else None, NORDICS)


def topic_case(topic: str, number: int, rng: Random) -> Case:
    """A case that the topic decides: with another plan, another region, both or neither; an injury also with those that override."""
    plans, regions = ((TOP_PLAN,), (NORDICS,)) if topic == "injury" and number % 8 < 4 else (OTHER_PLANS, OTHER_REGIONS)
    plan = pick(rng, plans) if number % 4 in (1, 3) else None
    region = pick(rng, regions) if number % 4 in (2, 3) else None
    return Case(topic, plan, region)


def word(case: Case, split: str, rng: Random) -> Ticket:
    """Say a case in the words of one split: core sentence, then what surrounds it, then plan and region."""
    phrases = PHRASES[split]
    core = pick(rng, phrases["cores"][case.topic])
    frame, other = pick_frame(case, phrases, rng)
    context = pick_context(case, phrases, NEAR_MISS[split], rng)
    text = context.replace("{body}", frame.replace("{core}", core)).format(**slots(case, phrases, rng), other=other)
    if rng.random() < MISTYPED:
        text = mistype(text, rng)
    return Ticket(case, text, tuple(template for template in (core, frame, context) if template not in ("{core}", "{body}")))


def pick_frame(case: Case, phrases: dict, rng: Random) -> tuple[str, str]:
    """An opening or closing sentence, sometimes one that mentions a topic which the ticket is not about."""
    other = pick(rng, [topic for topic in QUEUES if topic != case.topic])
    chance = rng.random()
    if chance < DISTRACTED:
        kind = "unhurt" if other == "injury" else "distracted"
        return pick(rng, phrases["frames"][kind]), pick(rng, phrases["nouns"].get(other, [""]))
    return (pick(rng, phrases["frames"]["plain"]) if chance < FRAMED else "{core}"), ""


def pick_context(case: Case, phrases: dict, share: float, rng: Random) -> str:
    """What names plan and region; a `share` of it also names a plan or place that does not count."""
    if case.kind == "none":
        return "{body}"
    near_miss = rng.random() < share
    return pick(rng, [template for template in phrases["contexts"][case.kind] if is_near_miss(template) == near_miss])


def is_near_miss(template: str) -> bool:
    """Whether the template mentions a plan or a place that does not count."""
    return "{rival}" in template or "{elsewhere}" in template


def slots(case: Case, phrases: dict, rng: Random) -> dict[str, str]:
    """A filler for every slot; `rival` and `elsewhere` are the plan and place that do not count."""
    filled = {name: pick(rng, fillers) for name, fillers in phrases["slots"].items()}
    rivals = OTHER_PLANS if case.plan == TOP_PLAN else (TOP_PLAN, pick(rng, [plan for plan in OTHER_PLANS if plan != case.plan]))
    elsewhere = pick(rng, OTHER_REGIONS) if case.region == NORDICS else NORDICS
    return filled | {
        "plan": case.plan or "",
        "region": case.region or "",
        "place": pick(rng, phrases["places"][case.region or NORDICS]),
        "rival": pick(rng, rivals),
        "elsewhere": pick(rng, phrases["places"][elsewhere]),
    }


def mistype(text: str, rng: Random) -> str:
    """Swap two inner letters of one long lower-case word."""
    words = text.split(" ")
    long = [index for index, found in enumerate(words) if len(found) > 5 and found.isalpha() and found.islower()]
    if not long:
        return text
    index = pick(rng, long)
    at = 1 + int(rng.random() * (len(words[index]) - 3))
    found = words[index]
    words[index] = found[:at] + found[at + 1] + found[at] + found[at + 2 :]
    return " ".join(words)


def tickets(split: str) -> list[Ticket]:
    """All tickets of one split in file order, no text twice."""
    rng = Random(SEEDS[split])
    by_text: dict[str, Ticket] = {}
    for case in cases(split, rng):
        ticket = word(case, split, rng)
        while ticket.text in by_text:
            ticket = word(case, split, rng)
        by_text[ticket.text] = ticket
    return shuffled(rng, list(by_text.values()))


def messages(ticket: Ticket) -> list[dict[str, str]]:
    """The conversation that is trained on, or asked."""
    turns = (("system", INSTRUCTION), ("user", ticket.text), ("assistant", ticket.queue))
    return [{"role": role, "content": content} for role, content in turns]


def render(split_tickets: list[Ticket]) -> str:
    return "".join(json.dumps({"messages": messages(ticket)}) + "\n" for ticket in split_tickets)


def templates(split: str) -> set[str]:
    """Every sentence pattern a split may use, letter case aside."""
    phrases = PHRASES[split]
    groups = (*phrases["cores"].values(), *phrases["frames"].values(), *phrases["contexts"].values())
    return {template.lower() for group in groups for template in group}


def check_apart(train: list[Ticket], heldout: list[Ticket]) -> None:
    """Held-out phrasing that training shows would make the score meaningless."""
    shared = templates("train") & templates("heldout") or {ticket.text for ticket in train} & {ticket.text for ticket in heldout}
    if shared:
        raise SystemExit(f"phrases.json: in both splits: {sorted(shared)}; reword the held-out side")


def main(arguments: list[str]) -> int:
    splits = {split: tickets(split) for split in COUNTS}
    check_apart(splits["train"], splits["heldout"])
    stale = []
    for split, made in splits.items():
        path, text = HERE / f"{split}.jsonl", render(made)
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.is_file() or path.read_bytes() != text.encode():
            stale.append(path.name)
    print(f"differ from the script: {', '.join(stale)}" if stale else " · ".join(f"{split} {len(made)}" for split, made in splits.items()))
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
