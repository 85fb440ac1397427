"""Every speed that the README claims: a command each, peers side by side in the same run."""
