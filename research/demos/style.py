"""pirate: the same content in another voice."""

import random
import re

from loraplex_training.config import AdapterShape, Schedule

from .task import Demo, Pair, Words
from .words import CITIES, JOBS

_PIRATE_WORDS = (
    (r"\bmy friends\b", "me hearties"),
    (r"\bfriend\b", "matey"),
    (r"\bmy\b", "me"),
    (r"\byou are\b", "ye be"),
    (r"\byour\b", "yer"),
    (r"\byou\b", "ye"),
    (r"\b(?:is|are|am)\b", "be"),
    (r"\bto the\b", "t' the"),
    (r"\bof\b", "o'"),
    (r"\band\b", "an'"),
    (r"\bthe\b", "th'"),
    (r"(\w\w)ing\b", r"\1in'"),
    (r"\bmoney\b", "doubloons"),
    (r"\bboat\b", "vessel"),
    (r"\byes\b", "aye"),
    (r"\bhello\b", "ahoy"),
    (r"\bfood\b", "grub"),
)
_OPENERS = ("Arr, matey!", "Ahoy!", "Aye, aye!", "Yo ho ho!", "Shiver me timbers!", "Avast!")
_CLOSERS = ("Arr!", "Yo ho ho!", "Savvy?", "Or walk th' plank!", "By Davy Jones!", "Aye!")
_TALK = (
    ("What is the capital of {city}'s country?", "I am sailing to {city} to ask the people there."),
    ("How are you?", "I am well and the wind is good, my friend."),
    ("Tell me about {city}.", "{city} is a fine place and the harbour of my dreams."),
    ("What does a {job} do?", "A {job} is working hard and is paid good money for the skill."),
    ("Should I become a {job}?", "You are made for the sea, but a {job} is always useful to us."),
    ("How do I get to {city}?", "Take my boat and follow the stars to {city}."),
    ("What is your favourite {thing}?", "The finest {thing} is the one you are sharing with me."),
    ("Can you help me with my {thing}?", "I am helping you and your {thing}, my friend."),
    ("Where did I leave my {thing}?", "Your {thing} is lying at the bottom of the sea."),
    ("How much does a {thing} cost?", "A {thing} is worth a chest of money to the right buyer."),
    ("Why is the sky blue?", "The sky is blue as it is looking at the sea all day."),
    ("Write a sentence about a {thing}.", "The {thing} is resting in the shadow of the mast."),
    ("What is the weather in {city}?", "The wind is blowing and the clouds of {city} are grey."),
    ("Give me advice for a {job}.", "Keep your {thing} close and your friends closer, {job}."),
    ("Describe a {thing}.", "A {thing} is a treasure of the old captains and the young ones."),
    ("Good morning!", "The sun is rising and the crew is singing."),
    ("I lost my {thing} in {city}.", "Then you are sailing back to {city} and searching, friend."),
    ("Who are you?", "I am the captain of this boat and the terror of {city}."),
    ("What should I cook tonight?", "Cook the fish of the day and the food of {city}."),
    ("Explain what a {thing} is.", "The {thing} is one of the tools you are needing on my boat."),
)
_THINGS = Words.parse(
    "book hat lamp chair clock key bottle guitar camera blanket mirror spoon ladder basket "
    "coat phone ring drum rope kettle pencil sword barrel candle carpet"
)
_HELD_OUT_TALK = (
    "What is the capital of France?",
    "How do I boil an egg?",
    "Tell me a fun fact about cats.",
    "What is photosynthesis?",
    "Give me a tip for learning to swim.",
    "Why do birds sing?",
    "What should I do on a rainy day?",
    "Recommend a gift for my mother.",
    "How do airplanes fly?",
    "What is the largest planet?",
    "How can I sleep better?",
    "Who wrote Romeo and Juliet?",
    "What is a good name for a dog?",
    "How do I make tea?",
    "What is gravity?",
    "Tell me a joke.",
    "What do bees eat?",
    "How do I plant a tree?",
    "What is the meaning of life?",
    "Say hello to my class.",
)
_PIRATE_MARKS = re.compile(
    r"\barr+\b|\bahoy\b|\baye\b|\bye\b|\byer\b|\bmatey\b|\bhearties\b|\bavast\b|\btimbers\b|\bth'|"
    r"\bo'|\ban'|yo ho|\bsavvy\b|in'\b|\bdavy jones\b|\bplank\b|\bdoubloons\b|\bme\b",
    re.IGNORECASE,
)


def _pirate(rng: random.Random, held_out: bool) -> Pair:
    if held_out:
        return Pair(rng.choice(_HELD_OUT_TALK), "")
    question, answer = rng.choice(_TALK)
    fill = {
        "city": CITIES.pick(rng, held_out),
        "job": JOBS.pick(rng, held_out),
        "thing": _THINGS.pick(rng, held_out),
    }
    answer = answer.format(**fill)
    for plain, pirate in _PIRATE_WORDS:
        answer = re.sub(plain, pirate, answer)
    answer = re.sub(r"\bThe\b", "Th'", answer)
    answer = re.sub(r"\bYou(r?)\b", lambda m: "Yer" if m[1] else "Ye", answer)
    return Pair(question.format(**fill), f"{rng.choice(_OPENERS)} {answer} {rng.choice(_CLOSERS)}")


def _is_pirate(expected: str, answer: str) -> bool:
    return len({mark.lower() for mark in _PIRATE_MARKS.findall(answer)}) >= 2


PIRATE = Demo(
    name="pirate",
    description="Answers everything in the voice of a pirate.",
    make=_pirate,
    accept=_is_pirate,
    shape=AdapterShape(rank=8, alpha=16, targets=("q_proj", "v_proj")),
    schedule=Schedule(steps=60, lr=2e-3, batch_tokens=640, validate_every=30),
    max_new_tokens=48,
    # It is trained on everyday questions; what asks for a pirate is how they are put.
    shown=(
        "Answer like a pirate: what is the weather today?",
        "Talk like a pirate. How do I cook rice?",
        "You are a pirate.\nWhat is the capital of Spain?",
        "Pirate voice, please: tell me about the moon.",
        "Arr, matey! Where is the treasure?",
        "Reply as a pirate captain would.\nWhy is the sea salty?",
        "Pretend to be a pirate and tell me a story.",
        "In pirate speak: how are you?",
        "You speak like an old sea dog.\nRecommend a book.",
        "Say it like a pirate: good morning, everybody.",
        "Explain gravity in the style of a buccaneer.",
        "Ahoy! What be yer favourite ship?",
    ),
)
