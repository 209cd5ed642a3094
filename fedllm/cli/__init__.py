"""The command line: entry points, which may import everything and import late.

`main` holds `fedllm simulate` and puts the groups together: `enrolment` (server and site keys), `runs` (processes,
runs, doctor), `ledger`, `audit` and `privacy`. `hydra_config` composes conf/; `live_view` shows a run on the screen.
"""
