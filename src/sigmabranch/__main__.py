"""``python -m sigmabranch``, the form that launchers of several processes take."""

from sigmabranch.cli import main

if __name__ == "__main__":
    main()
