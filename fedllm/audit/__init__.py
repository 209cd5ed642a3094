"""What a run leaves for people to read, and the audit of its evidence.

`summary` writes what a run prints at its end. `evidence` checks what was signed and computes every epsilon again;
`model` is what it finds, `report` the pages, `bundle` the signed folder of it all, `trust` whose keys are believed.
"""
