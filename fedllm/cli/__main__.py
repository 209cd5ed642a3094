"""`python -m fedllm.cli`: in services, runs and tests, which may have no `fedllm` on their path."""

from fedllm.cli.main import main

if __name__ == "__main__":
    main()
