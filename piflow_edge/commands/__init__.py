"""The subcommands of `piflow-edge`, by what they are about."""
