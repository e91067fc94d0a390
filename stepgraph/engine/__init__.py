"""From requests to steps: request, scheduler, KV blocks, and the loop that joins them to the runner."""
