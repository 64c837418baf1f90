"""`python -m tamzoo` is `tamzoo`, where the package is not installed too."""

from tamzoo.cli import main

main()
