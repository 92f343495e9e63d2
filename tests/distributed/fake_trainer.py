"""What Trainer, JobSet and Job controllers and a kubelet do with a job that the fake API has stored.

As seen of the real ones (Trainer 2.3, JobSet 0.12, Kubernetes 1.36): containers restart in their pods, and at
the limit the pods are deleted.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

NOW = "2026-01-01T00:00:00Z"
RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")


class LocalNode:
    """A node of a job as a process of this machine."""

    @staticmethod
    def address(name):
        return "127.0.0.1"

    def __init__(self, name, container, environment, log):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*container["command"], *container["args"]],
                env={"PATH": path, "HOME": str(log.parent), "PYTHONPATH": ":".join(sys.path)} | environment,
                cwd=log.parent,
                stdout=output,
                stderr=output,
            )
        self.log = log

    def poll(self):
        return self.process.poll()

    def output(self):
        return self.log.read_text()

    def stop(self):
        if self.process.returncode is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.process.pid)
            for process in [agent, *agent.children(recursive=True)]:  # torchrun's workers are no group of its
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


class Controllers:
    """That of jobs, nodes and events; needs what `FakeKubernetes` has."""

    def remove_pods(self, name):
        self.pods = {pod: entry for pod, entry in self.pods.items() if not pod.startswith(f"{name}-")}

    def put_pod(self, job, rank, restarts=0, code=None, waiting=None, unscheduled=None):
        """Let a pod of a job be seen, with how its container does."""
        ended = {"terminated": {"exitCode": code, "reason": "OOMKilled" if code == 137 else "Error"}}
        container = {
            "name": "node",
            "image": "",
            "imageID": "",
            "ready": waiting is None,
            "restartCount": restarts,
            "state": {"waiting": waiting} if waiting else {"running": {}},
            "lastState": {} if code is None else ended,
        }
        name = f"{job}-node-0-{rank}-abcde"
        status = {"phase": "Pending" if waiting or unscheduled else "Running"}
        if unscheduled:
            entry = {"reason": "Unschedulable", "message": unscheduled}
            status["conditions"] = [{"type": "PodScheduled", "status": "False", **entry}]
        else:
            status["containerStatuses"] = [container]
        labels = {"jobset.sigs.k8s.io/jobset-name": job}
        with self.lock:
            self.pods[name] = {
                "metadata": {"name": name, "labels": labels},
                "spec": {"containers": []},
                "status": status,
            }

    def warn(self, kind, name, reason, message, time=NOW):
        """An event of the namespace."""
        about = {"kind": kind, "name": name}
        entry = {"metadata": {"name": f"{name}.1"}, "involvedObject": about, "type": "Warning"}
        self.events.append(entry | {"reason": reason, "message": message, "lastTimestamp": time})

    def suspend(self, name, value=True):
        """What `kubectl patch trainjob` with `spec.suspend` does."""
        with self.lock:
            self.jobs[name]["spec"]["suspend"] = value

    def status(self, name, condition="", reason="", message="", active=0, ready=0, failed=0, succeeded=0):
        """Say how a job does."""
        counts = {"active": active, "ready": ready, "failed": failed, "succeeded": succeeded, "suspended": 0}
        resumed = {"type": "Suspended", "status": "False", "reason": "Resumed", "message": ""}
        entry = {"type": condition, "status": "True", "reason": reason, "message": message}
        with self.lock:
            self.jobs[name]["status"] = {
                "jobsStatus": [{"name": "node", **counts}],
                "conditions": [resumed, *([entry] if condition else [])],
            }

    def run_nodes(self, name):
        """Run a job's nodes to its end."""
        job = self.jobs[name]
        count = job["spec"]["trainer"]["numNodes"]
        nodes, restarts = [], [0] * count
        while self.jobs.get(name) is job:
            if job["spec"].get("suspend") and nodes:
                self.end_nodes(name, nodes)
                self.status(name, "Suspended", "Suspended", "TrainJob is suspended")
            elif not job["spec"].get("suspend") and not nodes:
                starts = self.prepare(job)
                for rank in range(count):
                    nodes.append(starts(rank))
                    self.put_pod(name, rank)
                self.status(name, active=1, ready=1)
            elif nodes:
                self.disturb(name)
                for rank, code in enumerate([node.poll() for node in nodes]):
                    if code:
                        restarts[rank] += 1
                        if sum(restarts) > self.backoff_limit:
                            self.end_nodes(name, nodes)
                            said = f"jobset failed due to one or more job failures: {name}-node-0"
                            return self.status(name, "Failed", "FailedJobs", said, failed=1)
                        nodes[rank] = starts(rank)
                        self.put_pod(name, rank, restarts[rank], code if code > 0 else 128 - code)
                if not any(code is None or code for code in [node.poll() for node in nodes]):
                    return self.status(name, "Complete", "AllJobsCompleted", "jobset completed", succeeded=1)
            time.sleep(0.02)
        return self.end_nodes(name, nodes)

    def end_nodes(self, name, nodes):
        for node in nodes:
            node.stop()
        nodes.clear()
        self.remove_pods(name)

    def prepare(self, job):
        """What starts the node of a rank, as a kubelet would."""
        trainer, name = job["spec"]["trainer"], job["metadata"]["name"]
        (patch,) = job["spec"]["runtimePatches"]
        (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod = replicated["template"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert replicated["name"] == container["name"] == "node"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        (claim,) = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        # A node finds the volume where it is mounted, and here nothing is mounted anywhere.
        assert mounts[claim["name"]] == str(self.claims[claim["persistentVolumeClaim"]["claimName"]])
        environment = {}
        for entry in trainer.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            value = self.secrets[reference["name"]][reference["key"]] if reference else entry["value"]
            environment[entry["name"]] = value
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = self.start_node.address(f"{name}-node-0-0")

        def start(rank):
            values = (trainer["numNodes"], trainer["numProcPerNode"], rank, address, port)
            variables = environment | dict(zip(RESERVED, map(str, values), strict=True))
            expanded = {key: expand(trainer[key], variables) for key in ("command", "args")}
            log = self.folder / f"{name}-node-0-{rank}-{len(self.nodes)}.log"
            self.nodes.append(self.start_node(f"{name}-node-0-{rank}", trainer | expanded, variables, log))
            return self.nodes[-1]

        return start


def expand(words, variables):
    """Kubernetes' `$(NAME)` in commands and arguments."""
    return [re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], found[0]), word) for word in words]
