"""Made-up support tickets: `python tests/tickets.py tickets.csv 5000`; the same number and seed give the same file."""

import csv
import random
import sys
from pathlib import Path

# Category -> problems; a ticket names one or two of its category, each in one of two wordings.
PROBLEMS = {
    "billing": (
        ("my card was charged twice for {thing}", "I see two payments of {amount} for {thing}"),
        ("I would like a refund for {thing}", "when will the refund of {amount} reach my bank account"),
        ("the invoice for {thing} shows the wrong VAT number", "please send me the invoice of {month}"),
    ),
    "login": (
        ("the password reset email never arrives", "I cannot reset my password on {device}"),
        ("the two-factor code is always rejected", "I lost the phone with my authenticator app"),
        ("my account is locked after too many attempts", "it says my account is blocked since {month}"),
    ),
    "shipping": (
        ("my parcel with {thing} is a week late", "the tracking of {thing} has not moved since {month}"),
        ("{thing} arrived with a broken screen", "the box of {thing} was crushed and wet"),
        ("please change the delivery address of {thing}", "the courier went to my old address"),
    ),
    "bug": (
        ("the app crashes on {device} when I open settings", "the app closes by itself on {device}"),
        ("the dashboard takes a minute to load on {device}", "scrolling is very slow on {device}"),
        ("the CSV export of {month} is empty", "exporting a report fails with error {code}"),
    ),
}
WORDS = {
    "thing": ("a laptop stand", "the blue headphones", "two keyboards", "a phone case", "the desk lamp", "a webcam"),
    "amount": ("12 euros", "49.90", "120 dollars", "8 pounds"),
    "month": ("January", "March", "last June", "October"),
    "device": ("my iPhone", "Android 14", "Windows 11", "an old iPad", "Firefox"),
    "code": ("500", "403", "E17"),
}
OPENINGS = ("Hello,", "Hi team,", "Good morning,", "Dear support,", "Hi,", "")
ENDINGS = ("Please help.", "Can you look into this?", "Thanks in advance.", "This is urgent.", "Regards, Kim", "")


def write_tickets(path: Path, n_tickets: int, seed: int = 0) -> None:
    """A CSV with the columns ticket_id, category and text."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ticket_id", "category", "text"])
        for number in range(n_tickets):
            category = draw.choice(list(PROBLEMS))
            writer.writerow([f"T{number:05d}", category, _text(draw, category)])


def _text(draw: random.Random, category: str) -> str:
    problems = draw.sample(PROBLEMS[category], 2 if draw.random() < 0.3 else 1)
    words = {name: draw.choice(choices) for name, choices in WORDS.items()}
    told = ". Also, ".join(draw.choice(wordings).format(**words) for wordings in problems)
    return " ".join(part for part in (draw.choice(OPENINGS), f"{told}.", draw.choice(ENDINGS)) if part)


if __name__ == "__main__":
    write_tickets(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
