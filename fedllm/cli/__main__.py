"""`python -m fedllm.cli`: in services, runs and tests, where no script is installed."""

from fedllm.cli.main import main

if __name__ == "__main__":
    main()
