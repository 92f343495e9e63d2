"""As much of W&B's server as a run with artifacts needs; it takes its time to store a checkpoint."""

import json
import re
import threading
from contextlib import suppress
from typing import ClassVar

from servers import SlowServer

PROJECT = {"id": "1", "internalId": "1", "name": "dynamic-transformers", "entity": {"id": "1", "name": "me"}}
SEQUENCE = {"__typename": "ArtifactSequence", "name": "checkpoint", "project": PROJECT}
ARTIFACT = {
    "__typename": "Artifact",
    "id": "1",
    "state": "COMMITTED",
    "artifactSequence": SEQUENCE | {"latestArtifact": None},
    "versionIndex": 0,
    "artifactType": {"name": "model"},
    "description": None,
    "metadata": None,
    "ttlDurationSeconds": 0,
    "ttlIsInherited": False,
    "tags": [],
    "historyStep": None,
    "size": 1,
    "digest": "d",
    "commitHash": "c",
    "fileCount": 1,
    "createdAt": "2026-01-01T00:00:00Z",
    "updatedAt": None,
    "aliases": [],
}


class WandbServer(SlowServer):
    """Attributes: what it has been asked, and when a checkpoint is stored."""

    asked: ClassVar[list[str]] = []
    stored = threading.Event()
    silent = False  # answers nothing any more

    def answer(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        values = {}
        if self.path.endswith("/graphql"):
            question = json.loads(body)
            found = re.match(r"\s*(?:query|mutation)\s*(\w+)", question["query"])
            name = found[1] if found else "viewer"
            self.asked.append(name)
            values = {"data": self.data(name, question.get("variables") or {})}
        elif self.path.endswith("/weights"):
            self.asked.append("weights")
            self.stored.wait()
        elif self.path.endswith("/file_stream"):
            self.asked.append(body.decode())
        if self.silent:
            self.stored.wait()
        with suppress(ConnectionError):  # nobody waits any more
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(values).encode())

    do_GET = do_POST = do_PUT = answer  # noqa: N815 (names of http.server)

    def data(self, name, variables):
        def place(file):
            return {
                "id": "1",
                "name": file,
                "uploadUrl": f"http://{self.headers['Host']}/files/{file}",
                "uploadHeaders": [],
            }

        if name == "Viewer":
            user = {"entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": {"id": "1", **user}}
        if name == "UpsertBucket":
            run = {"id": "1", "name": variables["name"], "displayName": "my-run", "config": "{}"}
            return {"upsertBucket": {"bucket": run | {"project": PROJECT, "historyLineCount": 0}}}
        if name == "CreateRunFiles":
            files = [place(file) for file in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if name == "ArtifactType":
            return {"project": {"artifact": None}}
        if name == "CreateArtifact":
            return {"createArtifact": {"artifact": ARTIFACT | {"state": "PENDING"}}}
        if name == "CreateArtifactManifest":
            return {"createArtifactManifest": {"artifactManifest": {"id": "1", "file": place("manifest")}}}
        if name == "CreateArtifactFiles":
            files = [place(file["name"]) for file in variables["input"]["artifactFiles"]]
            nodes = [{"node": file | {"storagePath": "s", "artifact": {"id": "1"}}} for file in files]
            return {"createArtifactFiles": {"files": {"edges": nodes}}}
        if name == "CommitArtifact":
            return {"commitArtifact": {"artifact": ARTIFACT}}
        if name == "ArtifactByID":
            return {"artifact": ARTIFACT}
        return {}
