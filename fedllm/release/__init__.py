"""From a run's adapter to answers: released with its evidence, served, evaluated, taught to smaller models."""
