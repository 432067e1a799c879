"""docs/study.md and its figures from results.json."""


def draw() -> None:
    print("nothing drawn")
