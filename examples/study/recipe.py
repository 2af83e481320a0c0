"""Which recipe the study fine-tunes with: a rule over the rows of the search, written down before the search."""

from collections.abc import Iterable

from examples.study.plan import Candidate, Study


class NoRecipeError(ValueError):
    """No candidate reaches what the study asks of its recipe."""


def radii(study: Study) -> list[float]:
    """The candidates' radii in the order in which they are tried."""
    return list(dict.fromkeys(candidate.eps for candidate in study.candidates))


def tried(study: Study, rows: Iterable[dict]) -> list[Candidate]:
    """The candidates that must be tried: those of a further radius only where none of the radii before it is enough."""
    found: list[Candidate] = []
    rows = list(rows)
    for eps in radii(study):
        group = [candidate for candidate in study.candidates if candidate.eps == eps]
        found += group
        if not all(scores(rows, c) for c in group) or any(enough(study, rows, c) for c in group):
            break
    return found


def chosen(study: Study, rows: Iterable[dict]) -> Candidate | None:
    """The recipe: of the first radius at which a candidate is enough, the candidate with the highest PGD-20 accuracy.

    None while candidates have no rows yet.  Raises NoRecipeError if none is enough.
    """
    rows = list(rows)
    candidates = tried(study, rows)
    if not all(scores(rows, candidate) for candidate in candidates):
        return None
    good = [candidate for candidate in candidates if enough(study, rows, candidate)]
    if not good:
        clean, robust = (f"{share:.0%}" for share in study.least)
        raise NoRecipeError(f"no candidate reaches {clean} clean and {robust} under PGD-20 on the held-out images")
    # The first of equals: max keeps the order of the plan.
    return max(good, key=lambda candidate: scores(rows, candidate)[1])


def enough(study: Study, rows: list[dict], candidate: Candidate) -> bool:
    """Whether a candidate's accuracies reach the study's least."""
    return all(value >= least for value, least in zip(scores(rows, candidate), study.least))


def scores(rows: list[dict], candidate: Candidate) -> tuple[float, ...]:
    """(clean, PGD-20) accuracy of a candidate on the held-out images; () without a row."""
    for row in rows:
        if row["part"] == "search" and row["arm"] == candidate.name and row["what"] == "accuracy":
            return tuple(row["results"][attack]["accuracy"] for attack in ("clean", "pgd-20"))
    return ()
