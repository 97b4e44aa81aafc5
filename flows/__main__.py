"""``python -m flows`` is ``rgcp`` with the code of the working directory, as the stages of ``dvc.yaml`` want it."""

from flows.cli import main

if __name__ == "__main__":
    main()
