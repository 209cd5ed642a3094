"""Train on records of your own that are in a pandas frame: here, invented questions at three shops.

python examples/own_data.py training.rounds=9

The arguments are overrides, as for `fedllm simulate`.
"""

import sys
from pathlib import Path

import pandas as pd

import fedllm

FOLDER = Path("own-data")
OPENS = {"north": 8, "south": 9, "harbour": 7}


def records(shop: str, customers: int) -> pd.DataFrame:
    """Return what customers of a shop have asked: each two questions."""
    asked = [
        {"shop": shop, "customer": f"{shop}-{n}", "question": question, "answer": answer}
        for n in range(customers)
        for question, answer in (
            (f"Customer {n} asks when the {shop} shop opens.", f"At {OPENS[shop]}."),
            (f"Is the {shop} shop open on day {n % 7}?", "Yes." if n % 7 < 6 else "No."),
        )
    ]
    return pd.DataFrame(asked)


def main() -> None:
    """Write the records to files, and train on them."""
    FOLDER.mkdir(exist_ok=True)
    train = pd.concat([records(shop, customers=60) for shop in OPENS])
    heldout = pd.concat([records(shop, customers=4) for shop in OPENS])  # public: it must hold nobody's records
    train.to_parquet(FOLDER / "train.parquet")
    heldout.to_parquet(FOLDER / "heldout.parquet")

    run = fedllm.simulate([
        "data=records", f"data.train={FOLDER}/train.parquet", f"data.heldout={FOLDER}/heldout.parquet",
        "data.prompt='Q: {question} A:'", "data.text=' {answer}'",
        "data.description='invented questions at three shops'",
        "data.unit=customer", "privacy.unit=person",  # all records of one customer are protected together
        "privacy.records_per_person=2",
        "federation.partition.column=shop",  # every shop is a site
        "name=own-data", *sys.argv[1:],
    ])  # fmt: skip
    print(f"epsilon {run.epsilon:.2f} for every customer, delta {run.delta:g}")
    print(pd.DataFrame(run.metrics)[["round", "epsilon", "loss", "accuracy"]].to_string(index=False))


if __name__ == "__main__":
    main()
