"""How a flow run works on this machine: stages as tasks, each in a process of its own."""
