"""The same federation in pfl-research, in one process: the work of `peers.py`, which runs this as a process.

A site is a user, all of them in every round. Its records are drawn anew each round at the plan's rate and trained on
in one plain step; the update of the whole site is clipped and noised at the server.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.dataset import Dataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_accountant import PLDPrivacyAccountant
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism

from simulations.benchmarks.stock_flower import encoded, lora_model, loss_of, settings, without_padding


class _Trained(torch.nn.Module):
    """The model, with the loss and the metrics that pfl asks for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss_of(self.model(input_ids=ids).logits, labels)

    def metrics(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Weighted]:
        return {"loss": Weighted(float(self.loss(ids, labels)) * len(ids), len(ids))}


class _Timed(TrainingProcessCallback):  # type: ignore[misc]
    """Prints a line for each round."""

    def __init__(self, records: float, epsilon: float) -> None:
        self._began, self._records, self._epsilon = time.monotonic(), records, epsilon

    def after_central_iteration(
        self, aggregate: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        del aggregate, model, central_iteration
        seconds = time.monotonic() - self._began
        print(json.dumps({"seconds": seconds, "records": self._records, "epsilon": self._epsilon}), flush=True)
        self._began = time.monotonic()
        return False, Metrics()


def main(folder: Path) -> None:
    """Run the federation and print a JSON line a round."""
    told = settings(folder)
    torch.set_num_threads(1)
    sites = [encoded(told, site, folder) for site in range(told["sites"])]
    coins = np.random.default_rng(0)

    def drawn(site: int) -> Dataset:
        chosen = [record for record in sites[site] if coins.random() < told["sampling_rate"]]
        return Dataset(list(without_padding(chosen)))

    # One update for each site and round, and all sites every time: a Gaussian mechanism without sampling.
    accountant = PLDPrivacyAccountant(
        num_compositions=told["rounds"], sampling_probability=1.0, mechanism="gaussian", epsilon=None,
        delta=told["delta"], noise_parameter=told["noise_multiplier"],
    )  # fmt: skip
    noise = CentrallyAppliedPrivacyMechanism(
        GaussianMechanism.from_privacy_accountant(accountant=accountant, clipping_bound=told["clip_norm"])
    )
    trained = _Trained(lora_model(told))
    values = [value for value in trained.parameters() if value.requires_grad]
    model = PyTorchModel(trained, torch.optim.SGD, torch.optim.SGD(values, lr=1.0))
    numbers = list(range(len(sites)))
    data = FederatedDataset(drawn, get_user_sampler("minimize_reuse", numbers))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=told["rounds"], evaluation_frequency=told["rounds"] + 1,
            train_cohort_size=len(sites), val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[noise]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=None, local_num_steps=told["local_steps"], local_batch_size=None,
            local_learning_rate=told["learning_rate"],
        ),
        callbacks=[_Timed(told["sampling_rate"] * sum(map(len, sites)), accountant.epsilon)],
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
