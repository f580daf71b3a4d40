"""onefold."""
