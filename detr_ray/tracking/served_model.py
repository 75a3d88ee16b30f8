"""What MLflow calls for each request to a served model (``mlflow models serve``): its protocol, and errors as 4xx.

MLflow is imported with this module, which nothing but a served model imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from detr_ray.tracking.logged_model import IMAGE_FIELD

Answer = Callable[[Sequence[str], Mapping[str, Any]], list[dict[str, Any]]]
"""From base64 texts of images and the parameters of a request to JSON values, one entry an image."""


class _Refusal(MlflowException):  # type: ignore[misc]
    """An answer of status 400, whose message stays as it is.

    MLflow would put the data of the request in front of it, and that is whole images.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """What is wrong with the request."""
        return self._message

    @message.setter
    def message(self, value: str) -> None:
        pass


class ServedModel(PythonModel):  # type: ignore[misc]
    """A model for MLflow's server.

    Args:
        load: gives a function that answers requests, from the folder of a package.
        refused: errors that are the fault of a request; their messages go to the client.
    """

    def __init__(self, load: Callable[[str], Answer], refused: tuple[type[Exception], ...]) -> None:
        self._load, self._refused = load, refused
        self._answer: Answer | None = None

    def load_context(self, context: Any) -> None:
        """Loads the package; MLflow calls it once."""
        self._answer = self._load(context.artifacts["package"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Answers a request.

        Args:
            context: not used; see `load_context`.
            model_input: a table with the column ``image``.
            params: ``threshold`` and ``top_k``.

        Raises:
            MlflowException: the request cannot be answered; becomes status 400.
        """
        assert self._answer is not None, "MLflow loads the context first"
        try:
            return self._answer(list(model_input[IMAGE_FIELD]), params or {})
        except self._refused as error:
            raise _Refusal(str(error)) from error


def serve(load: Callable[[str], Answer], refused: tuple[type[Exception], ...]) -> None:
    """Tells MLflow what to serve; see `ServedModel`."""
    set_model(ServedModel(load, refused))
