"""The window: the history of singular values over the last steps. Every process records those that it owns.

Shape legend: N = all singular values, n = those in one view, T = length of the window, t = steps recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Track:
    """History of one view; ``values_Tn`` is allocated at full length and filled step by step."""

    rows_n: Tensor
    values_Tn: Tensor
    filled: int = 0


class Trajectory:
    """Histories of the singular values that this process owns, one track per view.

    A track belongs to fixed rows. It is stored step by step, so that recording writes one contiguous line.
    """

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}

    @property
    def nbytes(self) -> int:
        """Memory of all tracks."""
        return sum(track.values_Tn.nbytes for track in self._tracks.values())

    def append(self, key: str, rows_n: Tensor, values_n: Tensor, window: int) -> None:
        """Record one step of view ``key``: global row numbers (n,) and their values (n,), which are copied.

        ``window`` is the number of steps that will be recorded.
        """
        if len(rows_n) == 0:
            return
        track = self._tracks.get(key)
        if track is None:
            track = _Track(rows_n.clone(), values_n.new_empty((window, len(rows_n)), dtype=torch.float32))
            self._tracks[key] = track
        elif track.values_Tn.device != values_n.device:  # after a restore
            track.values_Tn = track.values_Tn.to(values_n.device)
        assert track.filled < len(track.values_Tn), f"view {key} was observed more than {window} times"
        assert rows_n.shape == track.rows_n.shape, f"view {key} changed its rows inside a window"
        track.values_Tn[track.filled].copy_(values_n)
        track.filled += 1

    def assemble(self, total_rows: int, window: int, device: torch.device) -> Tensor:
        """This process's part of the window, (N, T) float32 on ``device``, with zeros elsewhere.

        The sum over processes is the whole window. It is exact, because every row has one owner.
        """
        whole_NT = torch.zeros((total_rows, window), dtype=torch.float32, device=device)
        for key, track in self._tracks.items():
            assert track.filled == window, f"view {key}: {track.filled} of {window} steps were observed"
            whole_NT[track.rows_n.to(device)] = track.values_Tn.T.to(device)
        return whole_NT

    def history(self, key: str, rows_n: Tensor) -> Tensor | None:
        """Recorded values (t, n) of the given rows of a view; None if nothing was recorded."""
        track = self._tracks.get(key)
        if track is None or track.filled == 0:
            return None
        order = torch.argsort(track.rows_n)
        rows_n = rows_n.to(order.device)
        place = order[torch.searchsorted(track.rows_n[order], rows_n).clamp(max=len(order) - 1)]
        assert torch.equal(track.rows_n[place], rows_n), f"view {key} does not own all of the rows asked for"
        return track.values_Tn[: track.filled, place.to(track.values_Tn.device)]

    def restore(self, key: str, rows_n: Tensor, values_tn: Tensor, window: int) -> None:
        """Restore the first t steps of a view. Recording continues with the next step."""
        filled = len(values_tn)
        assert filled <= window and values_tn.shape[1] == len(rows_n)
        values_Tn = values_tn.new_empty((window, len(rows_n)), dtype=torch.float32)
        values_Tn[:filled] = values_tn
        self._tracks[key] = _Track(rows_n.clone(), values_Tn, filled)

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._tracks.clear()
