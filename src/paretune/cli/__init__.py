"""The command line: parsing and printing only; each command imports what it needs when it is chosen."""
