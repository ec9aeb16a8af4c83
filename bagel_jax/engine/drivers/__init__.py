"""What gives the engine time: threads, or hosts in lock-step."""
