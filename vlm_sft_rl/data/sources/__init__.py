"""Source formats: from a file as its owner publishes it to rows, streamed; `data.convert` lists them."""
