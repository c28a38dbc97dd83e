"""`python -m ssa`."""

from ssa.cli import main

raise SystemExit(main())
