"""The contract between router, worker and clients: messages, their limits, errors and tickets."""
