"""Parts of a visit and contestants of a race that succeed and fail in every way; no heavy imports."""

import sys
import time


def passes(at) -> bool:
    print(f"| device | {at.device} |")
    return True


def fails_a_check(at) -> bool:
    print("| bitwise equal | NO |")
    return False


def raises(at) -> bool:
    print("| first table | 1 |", flush=True)
    raise ValueError("no such kernel")


def hangs(at) -> bool:
    print("| before it hangs | 1 |", flush=True)
    (at.folder / "prepared").touch()
    time.sleep(600)
    return True


def prepares(at) -> bool:
    (at.folder / "prepared").touch()
    sys.stdin.readline()
    print(f"| its turn came after others | {(at.folder / 'turn').exists()} |")
    return True


def takes_its_turn(at) -> bool:
    while not (at.folder / "prepared").exists():
        time.sleep(0.01)
    (at.folder / "turn").touch()
    return True


def contestant(turn) -> None:
    while True:
        turn()


def contestant_that_fails(turn) -> None:
    turn()
    raise ValueError("no such option")


def contestant_that_never_starts(turn) -> None:
    time.sleep(600)
