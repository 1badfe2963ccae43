"""The arithmetic of a merge: streamed, chunked, on threads, compiled or on a GPU."""
