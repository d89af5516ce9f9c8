# Key plugin for the storage manager of XCP-ng and XenServer (encrypted VHDs).
#
#   8.2, 8.3:  install -m 644 assay_keys.py /opt/xensource/sm/plugins/
#   9:         install -m 644 assay_keys.py "$(python3 -c 'import sm.plugins, os; print(os.path.dirname(sm.plugins.__file__))')"
#
# The storage manager imports it, and calls load_key at each activation of a VDI that has a key hash: VM start, resume, the
# destination of a migration, export and copy. What it raises stands in /var/log/SMlog; the VDI is then not activated.
#
# The storage manager runs on Python 2.7 in 8.2, on 3.6 in 8.3 and on 3.12 in 9: this file is valid in all three, and needs
# nothing but their standard libraries and XenAPI, which is where the storage manager is.
"""Gets the keys of encrypted VHDs from assay-agent, which gets them while this host is trusted."""

import errno
import json
import os
import re
import socket
import time

SOCKET = "/run/assay/agent.sock"
# How long the agent looks for a verifier, and how long it is waited for in all. The VDI is locked meanwhile.
ASK_S = 10
DEADLINE_S = 35
# The longest answer is a refusal with its reasons.
MAX_ANSWER = 1024 * 1024
KEY_BYTES = (32, 64)


class Refused(Exception):
    """There is no key; the text says why."""


def load_key(key_hash, vdi_uuid):
    """The raw key whose hash is key_hash, for the VDI that is to be activated."""
    if not re.match("^[0-9a-f]{64}$", key_hash):
        raise Refused("%r is not the hash of a key" % (key_hash,))
    check_vdi(key_hash, vdi_uuid)
    request = {"key_hash": key_hash, "vdi_uuid": vdi_uuid, "timeout_s": ASK_S}
    status, kind, body = post("/v1/vhd-key", json.dumps(request).encode("ascii"))
    if status == 200 and kind == "application/octet-stream" and len(body) in KEY_BYTES:
        return body
    raise Refused("no key for VDI %s: %s" % (vdi_uuid, reason(status, body)))


def check_vdi(key_hash, vdi_uuid):
    """That the VDI has this hash, and is of a kind that the storage manager encrypts."""
    try:
        import XenAPI
    except ImportError:
        # Not on a host with xapi.
        return
    session = XenAPI.xapi_local()
    session.xenapi.login_with_password("root", "", "", "assay")
    try:
        vdi = session.xenapi.VDI.get_by_uuid(vdi_uuid)
        config = session.xenapi.VDI.get_sm_config(vdi)
    finally:
        session.xenapi.session.logout()
    if config.get("image-format", "vhd").lower() != "vhd":
        raise Refused(
            "VDI %s is of format %s, which the storage manager would write in clear, key or no key: "
            "copy it to a VDI with sm-config:image-format=vhd" % (vdi_uuid, config["image-format"])
        )
    if config.get("key_hash", key_hash) != key_hash:
        raise Refused("VDI %s has key hash %s, not %s" % (vdi_uuid, config["key_hash"], key_hash))


def post(path, body):
    """One request to the agent: status, content type and body of its answer."""
    end = time.time() + DEADLINE_S
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(DEADLINE_S)
        connection.connect(os.environ.get("ASSAY_SOCKET", SOCKET))
        head = "POST %s HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (path, len(body))
        connection.sendall(head.encode("ascii") + body)
        return receive(connection, end)
    except socket.timeout:
        raise Refused("assay-agent did not answer within %d s: see `systemctl status assay-agent`" % DEADLINE_S)
    except (IOError, OSError) as error:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise Refused("assay-agent does not run: start it with `systemctl start assay-agent`")
        raise Refused("assay-agent could not be asked: %s" % error)
    finally:
        connection.close()


def receive(connection, end):
    """Status, content type and body of the answer, while there is time."""
    answer = b""
    while True:
        left = end - time.time()
        if left <= 0:
            raise socket.timeout()
        connection.settimeout(left)
        part = connection.recv(65536)
        answer += part
        parsed = parse(answer)
        if parsed:
            return parsed
        if not part or len(answer) > MAX_ANSWER:
            raise Refused("assay-agent's answer is cut off or too long: see `journalctl -u assay-agent`")


def parse(answer):
    """An HTTP answer with a length, once it is all there."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return None
    lines = head.decode("latin-1").split("\r\n")
    fields = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        fields[name.strip().lower()] = value.strip()
    status = re.match("^HTTP/1.1 ([0-9]{3})( |$)", lines[0])
    length = re.match("^([0-9]{1,7})$", fields.get("content-length", ""))
    if not status or not length:
        raise Refused("assay-agent's answer is malformed: are this file and the agent of one version?")
    if len(body) < int(length.group(1)):
        return None
    return int(status.group(1)), fields.get("content-type"), body[: int(length.group(1))]


def reason(status, body):
    """What the agent or the verifier says, in one line."""
    try:
        answer = json.loads(body.decode("utf-8"))
        return "; ".join([answer["error"]["message"]] + answer.get("reasons", []))
    except (ValueError, KeyError, TypeError):
        return "assay-agent answered with status %d and no reason" % status
