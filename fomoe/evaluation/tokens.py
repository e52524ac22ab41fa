"""Every scored token of a closed loop in one file, for pairing with later runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.evaluation.closed_loop import EXACT, Results
from fomoe.evaluation.statistics import Estimate, estimate_mean
from fomoe.evaluation.summary import joined
from fomoe.evaluation.texts import Window

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class TokenTable:
    """N scored tokens; columns of one policy are named `<policy>/<figure>`.

    Attributes:
        documents: str [N], the document of each token.
        steps: int64 [N], its decode step.
        targets: int64 [N], the true token.
        columns: float64 [N] each: `nll` in exact mode; `nll`, `kl`, `agrees`, and `null_nll` and
            `null_kl` where a null was run, of each policy.
    """

    documents: npt.NDArray[np.str_]
    steps: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    columns: dict[str, F64]

    @classmethod
    def of(cls, results: Results, windows: Sequence[Window]) -> TokenTable:
        """Return the table of a closed loop over these windows."""
        exact = joined(results.runs[EXACT])
        columns = {f"{EXACT}/nll": exact.scores.exact_nll}
        for spec, runs in results.runs.items():
            if spec == EXACT:
                continue
            scores = joined(runs).scores
            columns[f"{spec}/nll"] = scores.policy_nll
            columns[f"{spec}/kl"] = scores.kl
            columns[f"{spec}/agrees"] = scores.agrees.astype(np.float64)
            if spec in results.nulls:
                null = joined(results.nulls[spec]).scores
                columns[f"{spec}/null_nll"] = null.policy_nll
                columns[f"{spec}/null_kl"] = null.kl
        targets = np.concatenate([np.array(window.forced[1:], np.int64) for window in windows])
        return cls(exact.documents, exact.steps, targets, columns)

    def save(self, path: Path) -> None:
        """Write the table as a compressed NumPy archive."""
        arrays: dict[str, Any] = {
            "documents": self.documents, "steps": self.steps, "targets": self.targets,
            **self.columns,
        }  # fmt: skip
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> TokenTable:
        """Return the table of a file.

        Raises:
            ConfigError: the file cannot be read or holds something else.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
            return cls(arrays.pop("documents"), arrays.pop("steps"), arrays.pop("targets"), arrays)
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise ConfigError(f"{path}: not a table of scored tokens ({error!r})") from None

    def excess_over(self, reference: TokenTable, *, seed: int = 0) -> Estimate:
        """Return exact mode's NLL here minus that in another table, paired token by token.

        For another file of the same model, such as a smaller quantisation.

        Raises:
            ConfigError: the tables are not of the same tokens of the same documents.
        """
        for name in ("documents", "steps", "targets"):
            if not np.array_equal(getattr(self, name), getattr(reference, name)):
                raise ConfigError(
                    f"the runs differ in their {name}: {len(self.steps):,} and "
                    f"{len(reference.steps):,} tokens; use the same text, prefix, length and "
                    "number of documents, and files with the same tokenizer"
                )
        column = f"{EXACT}/nll"
        change = self.columns[column] - reference.columns[column]
        return estimate_mean(change, self.documents, seed=seed)
