"""`./devtool demo`: a guest writes to its disk while the processes below it are killed, and the host looks whether it was lied to."""
