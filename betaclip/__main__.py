"""`python -m betaclip` is `betaclip`."""

from betaclip.cli import main

if __name__ == "__main__":
    main()
