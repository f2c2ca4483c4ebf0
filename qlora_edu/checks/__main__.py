"""`python -m qlora_edu.checks`: a table of all exercises, as it stands in `docs/instructor.md`."""

from qlora_edu.checks import exercises


def table() -> str:
    """Every exercise with its difficulty, minutes and points, in Markdown."""
    lines = ["| exercise | | | minutes | points |", "|:--|:--|:--|--:|--:|"]
    for exercise in exercises().values():
        stars = "★" * exercise.difficulty
        lines.append(
            f"| `{exercise.id}` | {exercise.title} | {stars} | {exercise.minutes} | {exercise.points} |"
        )
    minutes, points = (sum(getattr(e, kind) for e in exercises().values()) for kind in ("minutes", "points"))
    lines.append(f"| | all of them | | {minutes} | {points} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
