"""Dom0's toolstack: builds, watches and ends domains on behalf of the command."""
