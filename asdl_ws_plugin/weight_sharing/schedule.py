"""When curvature and inverses are updated, where ASDL's own schedules do not say it."""

from __future__ import annotations

__all__ = ["is_due"]


def is_due(step: int, last: int | None, interval: int, early_updates: int) -> bool:
    """Whether a step makes an update.

    Args:
        step: of the question, from 0.
        last: the step of the last update, ``None`` if there was none. Asked again for that step, it
            is still due.
        interval: how far updates are apart in the end.
        early_updates: on that many first steps there is an update each; after it, at step t,
            updates are ``t // early_updates`` steps apart, as long as that is less than
            ``interval``.
    """
    if last is None or step == last:
        return True
    spacing = min(interval, step // early_updates) if early_updates else interval
    return step - last >= max(1, spacing)
