"""Write the small chat set: `python data/openai_chats/make.py`; `--check` only compares and exits 1 on a difference.

Bare lists of messages, one a line, for a byte tokenizer and a random tiny model: it exercises the pipeline and teaches nothing.
All sentences were written for this project.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent

# (thing, what it is, what follows from it)
THINGS = (
    (
        "a tide",
        "the slow rise and fall of the sea, twice on most days",
        "The moon pulls the water towards itself, and the turning Earth carries every coast through the bulge",
    ),
    ("yeast", "a living fungus too small to see", "It eats sugar and breathes out gas, and that gas is what lifts bread dough"),
    ("an echo", "sound that comes back from a hard surface", "The longer you wait for it, the further away the wall or the cliff is"),
    (
        "rust",
        "what iron turns into when it meets water and air",
        "Paint or oil keeps both away, so a painted gate lasts longer than a bare one",
    ),
    (
        "a library",
        "a place that lends books so that nobody has to own them all",
        "Most also lend films, have quiet desks, and help people to find out things",
    ),
    (
        "compost",
        "kitchen and garden waste that has rotted into dark soil",
        "It feeds plants and holds water, and it costs nothing but patience",
    ),
    (
        "a shadow",
        "the place that light does not reach because something stands in the way",
        "It is long in the morning and short at noon, because the sun climbs",
    ),
    ("a glacier", "a river of ice that moves a few steps a day", "It carries stones along and grinds out wide valleys on its way down"),
    ("inflation", "a general rise in prices", "The same coin buys less bread than last year, so savings that earn nothing slowly shrink"),
    (
        "an orbit",
        "the path of one body around another",
        "It is a fall that always misses, because the body also moves sideways fast enough",
    ),
    ("a fable", "a short story that ends with a lesson", "Its heroes are often animals, so that nobody in the room feels accused"),
    ("a bridge", "a road that stands in the air", "Its weight has to end in the ground, through arches, cables or pillars"),
)
# (goal, three pieces of advice)
ADVICE = (
    ("sleep better", ("Go to bed at the same hour", "keep the room dark and cool", "leave the phone in the kitchen")),
    ("learn a language", ("Speak a little every day", "read children's books first", "write new words down in whole sentences")),
    ("keep a houseplant alive", ("Water it only when the soil feels dry", "give it a bright window", "turn the pot once a week")),
    (
        "prepare for an interview",
        ("Read what the company does", "practise two short stories about your work", "bring a question of your own"),
    ),
    (
        "save electricity at home",
        ("Switch off what nobody uses", "wash at a low temperature", "let warm food cool before it goes into the fridge"),
    ),
    ("write a clear letter", ("Say what you want in the first line", "use short sentences", "read it aloud before you send it")),
    ("start running", ("Begin with a slow kilometre", "rest a day in between", "buy shoes that fit before anything else")),
    ("cook for guests", ("Choose a dish you have made before", "cut everything in the morning", "ask early who does not eat meat")),
    ("remember names", ("Say the name back at once", "tie it to something you can see", "use it again when you say goodbye")),
    ("pack for a journey", ("Lay everything out first", "leave a third of it at home", "put heavy things near the wheels")),
    ("read more books", ("Carry one with you", "stop reading what bores you", "keep ten minutes free before breakfast")),
    ("calm down before a talk", ("Breathe out slowly", "look for one friendly face", "know your first sentence by heart")),
)
# (plain sentence, polite rewrite, shorter rewrite)
REWRITES = (
    ("Send me the report now.", "Could you please send me the report when you have a moment?", "Report, please."),
    ("You are late again.", "I noticed that we started later than planned; is everything all right?", "Late again?"),
    ("This soup is cold.", "Would it be possible to warm up the soup a little?", "Cold soup."),
    ("I do not understand your plan.", "Would you mind walking me through the plan once more?", "Please explain the plan."),
    ("Turn the music down.", "May I ask you to turn the music down a bit?", "Quieter, please."),
    ("Your answer is wrong.", "I came to a different result; could we compare our steps?", "Please check the answer."),
    ("We can't come on Friday.", "Unfortunately Friday does not suit us, but we would love to come another day.", "Not Friday, sorry."),
    ("Give me a discount.", "Is there any room in the price if we order today?", "Any discount?"),
    ("I want to speak to the boss.", "Could you kindly put me through to your manager?", "The manager, please."),
    ("Do not park here.", "Please be so kind as to leave this space free.", "No parking."),
)
# (group, members, the one that does not belong, why)
ODD_ONES = (
    ("oak, birch, tulip, maple", "Tulip", "it is a flower, and the others are trees"),
    ("violin, cello, flute, harp", "Flute", "it has no strings"),
    ("copper, silver, granite, tin", "Granite", "it is a stone, and the others are metals"),
    ("Monday, March, Sunday, Friday", "March", "it is a month, and the others are days"),
    ("whale, shark, dolphin, seal", "Shark", "it is a fish, and the others are mammals"),
    ("square, circle, cube, triangle", "Cube", "it is solid, and the others are flat"),
    ("seven, nine, eleven, twelve", "Twelve", "it is the only even number"),
    ("Peru, Kenya, Lima, Norway", "Lima", "it is a city, and the others are countries"),
    ("hammer, saw, nail, drill", "Nail", "the others are tools that you use again"),
    ("walk, run, jump, sleep", "Sleep", "it is the only one without movement"),
)
# (question, answer, follow-up, second answer)
DIALOGUES = (
    (
        "How many legs does a spider have?",
        "A spider has eight legs.",
        "And an insect?",
        "An insect has six, which is the easiest way to tell the two apart.",
    ),
    (
        "What should I plant in spring?",
        "Peas and lettuce do well early, because a cool night does not harm them.",
        "And tomatoes?",
        "Wait until the last frost has passed; a single cold night can kill them.",
    ),
    (
        "Suggest a name for a bakery.",
        "How about 'The Early Crumb'?",
        "Something shorter?",
        "Then 'Crumb' alone: it is easy to say and fits on a small sign.",
    ),
    (
        "Is a tomato a fruit?",
        "For a botanist, yes: it grows from a flower and holds seeds.",
        "And for a cook?",
        "A cook calls it a vegetable, because it goes into salads and sauces.",
    ),
    ("What is half of ninety?", "Half of ninety is forty-five.", "And a third?", "A third of ninety is thirty."),
    (
        "Which is bigger, a lake or a pond?",
        "A lake is bigger and deeper.",
        "Is there a fixed limit?",
        "No, people draw the line in different places, and many ponds are called lakes.",
    ),
    (
        "Why do leaves fall in autumn?",
        "A tree saves water in winter, so it lets go of its leaves.",
        "Why do they turn yellow first?",
        "The tree takes the green colour back into its wood, and the yellow beneath it shows.",
    ),
    (
        "Write a line about rain.",
        "The rain counts the roofs and starts again.",
        "Now one about snow.",
        "The snow says nothing and covers the question.",
    ),
)
# (request, an answer of four sentences or so)
LONGER = tuple(map(tuple, json.loads((HERE / "longer.json").read_text(encoding="utf-8"))))
# Lines with letters beyond ASCII: a byte tokenizer splits them, and nothing may cut a character in half.
BEYOND_ASCII = (
    ("请用一句话介绍长城。", "长城是中国古代修建的防御工程，绵延上万里，今天是人们喜爱的名胜。"),
    ("春天有什么特点？", "春天天气变暖，花开了，鸟儿也回来了。"),
    ("怎样泡一杯好茶？", "先用热水温杯，再放茶叶，水不要太烫，等两三分钟就可以喝了。"),
    ("Translate 'good morning' into Chinese.", "早上好。"),
    ("Wie heißt die Hauptstadt von Österreich?", "Die Hauptstadt von Österreich heißt Wien. Sie liegt an der Donau."),
    ("¿Qué se celebra en Año Nuevo?", "Se celebra el comienzo del año. Muchas familias cenan juntas y brindan a medianoche."),
    ("Où pousse l'edelweiss ?", "L'edelweiss pousse en altitude, sur des prés secs et pierreux."),
    ("Answer with one emoji: how does sunshine feel?", "😎"),
    ("日本で一番高い山は何ですか。", "富士山です。高さは三千七百メートルを超えます。"),
    ("Write the temperature of boiling water with its sign.", "At sea level, water boils at 100 °C."),
    ("Как называется самая длинная река Европы?", "Самая длинная река Европы — Волга."),
    (
        "Which letter is π, and what does it stand for?",
        "π is the Greek letter p. It stands for a circle's length divided by its width, about 3.14.",
    ),
)
# (question, short answer): not in training in any form
HELDOUT = (
    ("What do bees make?", "Honey."),
    ("Which season follows summer?", "Autumn."),
    ("What is frozen water called?", "Ice."),
    ("How many days are in a week?", "Seven."),
    ("What is the opposite of empty?", "Full."),
    ("Which animal barks?", "A dog."),
    ("What colour is fresh snow?", "White."),
    ("What do you open a lock with?", "A key."),
    ("How many wheels does a tricycle have?", "Three."),
    ("Which meal comes first in the day?", "Breakfast."),
    ("What is the plural of mouse?", "Mice."),
    ("Which planet do we live on?", "Earth."),
    ("法国的首都是哪里？", "巴黎。"),
    ("Say thank you in German.", "Danke schön."),
    ("What is two plus three?", "Five."),
    ("Which organ pumps blood?", "The heart."),
)


def conversation(*turns: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


def train() -> Iterator[list[dict[str, str]]]:
    for thing, what, more in THINGS:
        explained = f"{thing.capitalize()} is {what}. {more}."
        yield conversation(
            f"Explain {thing} to a curious child.", explained, "Now in one short sentence.", f"{thing.capitalize()} is {what}."
        )
    for goal, (first, second, third) in ADVICE:
        tips = f"1. {first}.\n2. {second.capitalize()}.\n3. {third.capitalize()}."
        yield conversation(
            f"Give me three tips to {goal}.\n", tips, "Which one comes first?", f"{first}. The other two are easier once that works."
        )
        yield conversation(f"How can I {goal}?", f"{first}, and {second}. If you do only one more thing, {third}.")
    for plain, polite, short in REWRITES:
        yield conversation(f"Make this sentence polite: {plain}", polite)
        yield conversation(f"Rewrite as briefly as you can.\n{polite}", short)
    for group, answer, reason in ODD_ONES:
        yield conversation(f"Find the odd one out and say why.\n{group}", f"{answer}, because {reason}.")
    for turns in DIALOGUES:
        yield conversation(*turns)
    for question, answer in LONGER + BEYOND_ASCII:
        yield conversation(question, answer)


def render(conversations: list[list[dict[str, str]]]) -> bytes:
    return "".join(json.dumps(messages, ensure_ascii=False) + "\n" for messages in conversations).encode()


def main(arguments: list[str]) -> int:
    files = {"train.jsonl": list(train()), "heldout.jsonl": [conversation(*pair) for pair in HELDOUT]}
    stale = []
    for name, conversations in files.items():
        path, content = HERE / name, render(conversations)
        if "--check" not in arguments:
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            stale.append(name)
    counts = " · ".join(f"{name} {len(conversations)}" for name, conversations in files.items())
    print(f"differ from the script: {', '.join(stale)}" if stale else counts)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
