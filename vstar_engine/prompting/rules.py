"""Turns a prompt into states by rules: sequences, seasons, times of day, weather, colours, growth and decay."""

import re
from collections.abc import Sequence
from itertools import pairwise

# longer prompts are not read for rules
LONGEST = 1000

# stages in order, each with the words that name it; those without a name lie between named ones
Stage = tuple[str, str]
YEAR = (
    ("winter", "covered in thick snow, bare trees"),
    ("", "the snow melts, patches of brown grass"),
    ("", "green shoots and small buds"),
    ("", "flowers bloom, trees adorned with fresh leaves"),
    ("spring", "a lush green meadow in full spring"),
    ("summer", "in summer, trees with dense dark green leaves"),
    ("", "late summer, the grass turns yellow"),
    ("autumn fall", "in autumn, orange and red leaves on the trees"),
    ("", "late autumn, brown leaves fall from thin trees"),
    ("", "snow is falling, bare trees"),
)
DAY = (
    ("night nighttime midnight", "at night, the moon stands in a dark sky"),
    ("dawn sunrise", "at dawn, a soft pink sky"),
    ("morning", "in the morning, a pale blue sky"),
    ("day daytime daylight noon midday", "by day, under a bright blue sky"),
    ("afternoon", "in the afternoon, warm low sunlight"),
    ("sunset evening", "at sunset, an orange and purple sky"),
    ("dusk twilight nightfall", "at dusk, the sky grows dark"),
)
CLEAR = ("clear sunny sunshine sun", "under a clear blue sky, bright sun")
CLOUDS = ("cloudy clouds overcast", "under grey clouds")
RAIN = ("rain rainy", "in the rain, a grey rainy sky")
STORM = ("storm stormy thunderstorm", "in a storm, dark clouds, lightning")
FLAKES = ("", "the first snowflakes fall from a grey sky")
SNOW = ("snow snowy snowfall", "snow is falling, white ground")
# weather changes along one of these lines, either way
WEATHER = ((CLEAR, CLOUDS, RAIN, STORM), (CLEAR, CLOUDS, FLAKES, SNOW), (STORM, RAIN, FLAKES, SNOW))

COLOURS = "red|orange|yellow|green|blue|purple|pink|white|black|grey|gray|brown|golden|silver"
GROWN = {"boy": "man", "man": "man", "girl": "woman", "woman": "woman", "child": "person", "person": "person"}
PLANTS = ("tree", "plant", "oak", "sunflower", "vine", "corn", "bamboo", "seedling", "bush")
SCENES = re.compile(r"\b(?:landscape|scenery|scene|nature|countryside|view|world|field|meadow|valley)s?\b", re.IGNORECASE)
# subjects that say no more than the change itself
EMPTY = re.compile(r"(?:the |a |an )?(?:(?:four )?seasons?|weather|time(?: of (?:day|year))?|year|day|it)?", re.IGNORECASE)

SLOWLY = r"(?:(?:is|are|slowly|gradually|smoothly|quickly|suddenly) )*"
CHANGING = r"(?:transition|chang|turn|shift|mov|go|pass|fad|evolv|transform|morph|develop|progress)(?:es|ing|s|e)?"
INTO = rf"{SLOWLY}(?:becom(?:es|ing|e)|(?:turn|chang|transform|morph|evolv|develop|melt|fad|grow)(?:es|ing|s|e)? (?:in)?to)"
TURNING = rf"{SLOWLY}(?:turn(?:s|ing)?|becom(?:es|ing|e)|chang(?:es|ing|e)|go(?:es|ing)?)(?: (?:in)?to)?"
THEN = r",? (?:and )?(?:then|finally|after that|followed by)(?: to)?,? "
LINK = rf"(?:{THEN}|,? (?:in)?to | {INTO} )(?:the |a |an )?(?:early |late |full |deep )?"
ARROW = re.compile(r"\s*(?:->|→|⇒|=>)\s*")
OPENING = re.compile(r"^(?:an? |the )?(?:video|movie|clip|film|animation|time[- ]?lapse)(?: video)?(?: of|:) ", re.IGNORECASE)
PREPOSITION = re.compile(r" (?:in|on|at|with|of|over|under|near|by|beside) ")
MOTION = re.compile(r"\b(?:walk|runn?|driv|fly|flie|sail|rid|travel|swim|jump|roll|climb)(?:ing|es|s)?$")

# what the prompt says happens, and the states of {n}, its noun; an article is put in or left out to fit
LIFE = (
    (r"bloom(?:s|ing)?|blossom(?:s|ing)?|opening", "a closed {n} bud|a {n} bud opening|a half open {n}|a {n} in full bloom"),
    (r"wilt(?:s|ing)?|wither(?:s|ing)?|dying|dies", "a fresh {n}|a drooping {n}|a withered brown {n}|a dry dead {n}"),
    (r"rot(?:s|ting)?|decay(?:s|ing)?", "a fresh {n}|a {n} with brown spots|a rotten brown {n}|a decayed black {n}"),
    (r"melt(?:s|ing)?", "a {n}, solid and whole|a {n} beginning to melt|a half melted {n}|a puddle of melted {n}"),
    (r"freez(?:es|ing)", "a {n}|a {n} with thin ice at the edges|a {n} covered in ice|a frozen white {n}"),
    (r"burn(?:s|ing)?(?: down)?", "a {n}|a {n} with small flames|a {n} in high flames and smoke|black ashes of a {n}"),
    (r"(?:being|getting) built|under construction", "an empty building site|a half built {n}|a finished {n}"),
    (r"(?:crumbl|collaps)(?:es|ing)", "a {n}|a {n} with cracked walls|a half collapsed {n}|ruins of a {n}"),
)
AGES = r"(?:getting|growing|gets|grows|becoming|becomes) old(?:er)?|ages|age?ing"
GROWS = r"grow(?:s|ing)?(?: up| tall| big)?|sprout(?:s|ing)?"
YOUNG = re.compile(r"^(?:young|little|small|tiny|baby) ")


def states(prompt: str) -> tuple[str, ...]:
    """Returns the states of a prompt in order; the prompt alone where no rule fits."""
    text = " ".join(prompt.split())
    if len(text) > LONGEST:
        return (prompt,)
    text = OPENING.sub("", text).rstrip(" .!")
    for rule in (_arrows, _seasons, _times, _weather, _sequence, _colours, _life, _from_to, _becomes):
        if len(found := rule(text)) > 1:
            return tuple(found)
    return (prompt,)


def _arrows(text: str) -> list[str]:
    return [part for part in ARROW.split(text) if part]


def _sequence(text: str) -> list[str]:
    """`First A, then B, finally C`."""
    parts = [re.sub(r"^(?:first(?:ly)?|at first),? ", "", part, flags=re.IGNORECASE) for part in re.split(THEN, text)]
    return [part.strip(" ,;") for part in parts if part.strip(" ,;")]


def _seasons(text: str) -> list[str]:
    if linked := _named(text, (YEAR,), circle=True):
        return linked
    if whole := re.search(r"(?:\bthrough )?\b(?:the|the four|four|all) seasons\b", text, re.IGNORECASE):
        return _scenes(_around(YEAR, 4, 0), _subject(text[: whole.start()], text[whole.end() :]))
    return []


def _times(text: str) -> list[str]:
    return _named(text, (DAY,), circle=True)


def _weather(text: str) -> list[str]:
    return _named(text, WEATHER, circle=False)


def _named(text: str, lines: Sequence[Sequence[Stage]], circle: bool) -> list[str]:
    """Returns the stages that the text links (`winter to spring`) and all between them."""
    for line in lines:
        index = {name: i for i, (names, _) in enumerate(line) for name in names.split()}
        word = rf"\b({'|'.join(index)})\b"
        found = re.search(
            rf"(?:\bfrom )?(?:\b(?:the|an?) )?(?:\b(?:early|late|deep) )?{word}(?:{LINK}{word})+", text, re.IGNORECASE
        )
        if not found:
            continue
        stops = [index[name.lower()] for name in re.findall(word, found[0], re.IGNORECASE)]
        stages = [line[stops[0]]]
        for a, b in pairwise(stops):
            stages += (_around if circle else _along)(line, a, b)[1:]
        return _scenes(stages, _subject(text[: found.start()], text[found.end() :]))
    return []


def _around(line: Sequence[Stage], a: int, b: int) -> list[Stage]:
    return [line[i % len(line)] for i in range(a, b + 1 if b >= a else b + len(line) + 1)]


def _along(line: Sequence[Stage], a: int, b: int) -> list[Stage]:
    return list(line[a : b + 1] if a <= b else line[b : a + 1][::-1])


def _subject(before: str, after: str) -> str:
    """Returns the subject of a change, from the words around it."""
    before = re.sub(
        rf"(?:(?:^|\s)(?:{SLOWLY}{CHANGING}|as|when|while|during|in|at|through)|[\s,])*$", "", before, flags=re.IGNORECASE
    )
    after = after.strip(" ,;")
    if EMPTY.fullmatch(before):
        before, after = "", re.sub(r"^(?:in|on|at|over|of|for|with) ", "", after)
    subject = f"{before} {after}".strip()
    return re.sub(r"^(?:A|An|The)\b", lambda article: article[0].lower(), subject) or "a landscape"


def _scenes(stages: Sequence[Stage], subject: str) -> list[str]:
    def scene(words: str) -> str:
        if words.startswith(("covered", "in ", "at ", "by ", "under ")):
            return f"{subject} {words}"
        return words if SCENES.search(subject) else f"{subject}, {words}"

    return [scene(words) for _, words in stages]


def _colours(text: str) -> list[str]:
    """`a red ball turning blue`, `a ball changing from red to blue`."""
    change = rf"(?:{SLOWLY}(?:{CHANGING} )?(?:colou?r )?from ({COLOURS}) (?:in)?to|{TURNING}) ({COLOURS})\b"
    found = re.fullmatch(rf"(.+?) {change}(.*)", text, re.IGNORECASE)
    if not found:
        return []
    subject, first, last, rest = found.groups()
    return [(described(subject, first) if first else subject) + rest, described(subject, last) + rest]


def described(subject: str, word: str) -> str:
    """Puts an adjective before the noun; a colour takes the place of another."""
    if re.fullmatch(COLOURS, word) and re.search(rf"\b(?:{COLOURS})\b", subject, re.IGNORECASE):
        return _articled(re.sub(rf"\b(?:{COLOURS})\b", word, subject, count=1, flags=re.IGNORECASE))
    end = found.start() if (found := PREPOSITION.search(subject)) else len(subject)
    start = subject.rfind(" ", 0, end) + 1
    return _articled(f"{subject[:start]}{word} {subject[start:]}")


def _articled(text: str) -> str:
    """Replaces a by an, and an by a, where the next word needs it."""
    return re.sub(r"\b(an?) (\w)", lambda m: ("an " if m[2].lower() in "aeiou" else "a ") + m[2], text, flags=re.IGNORECASE)


def _life(text: str) -> list[str]:
    for verb, templates in (*LIFE, (AGES, ""), (GROWS, "")):
        if found := re.fullmatch(rf"(an? |the )?(.+?) {SLOWLY}(?:{verb})( (?!(?:in)?to ).+)?", text, re.IGNORECASE):
            article, noun, rest = found.groups(default="")
            told = (templates or (_ages if verb is AGES else _growth)(noun.split()[-1])).split("|")
            told = [state.format(n=noun if templates else YOUNG.sub("", noun)) + rest for state in told]
            return [_articled(state) if article else state.removeprefix("a ").removeprefix("an ") for state in told]
    return []


def _ages(noun: str) -> str:
    if grown := GROWN.get(noun):
        return f"a young {{n}}|a young {grown}|a middle-aged {grown}|an old {grown}"
    return "a young {n}|a grown {n}|an old {n}"


def _growth(noun: str) -> str:
    if grown := GROWN.get(noun):
        return f"a baby {{n}}|a young {{n}}|a teenage {{n}}|a grown {grown}"
    if noun in PLANTS:
        return "bare brown soil|a small green shoot in the soil|a young {n}|a tall {n}"
    return "a tiny {n}|a small {n}|a big {n}"


def _from_to(text: str) -> list[str]:
    """`S changing from A to B`: an adjective joins the noun of S, a thing that S becomes stands for itself."""
    found = re.fullmatch(rf"(.*?) ?\b({SLOWLY}{CHANGING} )?from (.+?) (?:in)?to (.+)", text, re.IGNORECASE)
    if not found:
        return []
    subject, changing, first, last = found.groups()
    if not subject or "camera" in subject.lower() or (changing and re.match(r"(?:an?|the) ", first)):
        return [first, last]
    if MOTION.search(subject):
        return [f"{subject} near {first}", f"{subject} near {last}"]
    if " " in first or " " in last:
        return [f"{subject}, {first}", f"{subject}, {last}"]
    return [described(subject, first), described(subject, last)]


def _becomes(text: str) -> list[str]:
    """`A becomes B`; a single word that A becomes is an adjective of A if A has an article."""
    found = re.fullmatch(rf"(.+?) {INTO} (.+)", text, re.IGNORECASE)
    if not found:
        return []
    first, last = found.groups()
    adjective = " " not in last and re.match(r"(?:an?|the) ", first, re.IGNORECASE)
    return [first, described(first, last) if adjective else last]
