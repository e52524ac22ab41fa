"""Routes that the host decided, written where the next program brings them to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fomoe.errors import DeviceError
from fomoe.model.buffers import F32
from fomoe.model.gpu.mail import Mail
from fomoe.model.gpu.slots import ExpertSlots

I32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


class Routes:
    """Writes a layer's experts and weights into a device's mail, in ascending id.

    Views are kept: a token asks once per layer, and the host's time counts.

    Attributes:
        ids, weights: int32 and float32 [L, K], what the device chose or was told for a token.
    """

    def __init__(self, mail: Mail, slots: ExpertSlots, layers: Sequence[int]) -> None:
        self.ids: I32 = mail.picks.host["id"]
        self.weights: F32 = mail.picks.host["weight"]
        self._mail = mail
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._tables = list(slots.host_table)
        self._tokens = list(zip(mail.picks.host["address"], self.ids, self.weights, strict=True))
        self._row_bytes = int(mail.ids.host[0].nbytes)
        self._bits = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))

    def write_late(self, late: Bools) -> None:
        """Write which of a token's experts, bool [K], may be on their way."""
        self._mail.late.host[0] = self._bits[: len(late)][late].sum()

    def write_token(self, layer: int, ids: I32, weights: F32, late: Bools | None = None) -> None:
        """Write a token's int32 [K], ascending, and float32 [K], with where the experts lie.

        There may be fewer of them: those that are this device's. Late ones, bool [K], need not be
        resident yet.

        Raises:
            DeviceError: one of the others is not.
        """
        row, count = self._row[layer], len(ids)
        found = self._tables[row].take(ids, 1)
        if np.count_nonzero(found) < found.size:
            missing = found[0] == 0 if late is None else (found[0] == 0) & ~late
            if missing.any():
                _refuse(layer, ids[missing])
        addresses, own_ids, own_weights = self._tokens[row]
        if count < len(own_ids):
            addresses[:, count:] = 0
            addresses, own_ids, own_weights = (
                addresses[:, :count], own_ids[:count], own_weights[:count]
            )  # fmt: skip
        addresses[:], own_ids[:], own_weights[:] = found, ids, weights

    def send_prompt(self, layer: int, ids: I32, weights: F32) -> None:
        """Queue the copy of int32 and float32 [T, K].

        Raises:
            DeviceError: one of them is not resident.
        """
        row, mail = self._row[layer], self._mail
        missing = self._tables[row][0][ids] == 0
        if missing.any():
            _refuse(layer, np.unique(ids[missing]))
        order = np.argsort(ids, axis=1)
        mail.ids.host[row, : len(ids)] = np.take_along_axis(ids, order, 1)
        mail.weights.host[: len(ids)] = np.take_along_axis(weights, order, 1)
        mail.ids.send(row * self._row_bytes, ids.nbytes)
        mail.weights.send(0, weights.nbytes)


def _refuse(layer: int, ids: I32) -> None:
    raise DeviceError(f"layer {layer}: experts {ids.tolist()} are not resident")
