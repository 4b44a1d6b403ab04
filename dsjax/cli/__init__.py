"""The command `dsjax`: one file a verb, each with HELP, add_arguments(parser) and run(arguments) -> exit code."""
