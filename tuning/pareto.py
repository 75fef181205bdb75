"""The front of two aims: what no other trial beats in both."""

from collections.abc import Iterable


def front(points: Iterable[tuple[float, float, str]]) -> list[str]:
    """Ids of what no other point beats, the cheapest first.

    Args:
        points: cost, loss and id of each; less is better in both. Of equals the first id stays.
    """
    kept: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return [name for _, _, name in kept]
