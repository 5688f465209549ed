"""Everything that touches the output's file system: a staging folder beside the target, and one rename at the end.

    <parent>/.<out>.staging/        made first, removed last; found again by the next run of the same plan
        claim.<n>                   who is writing: host, process, start time; its mtime is the heartbeat
        journal.jsonl               first line: the plan; then one line a row that is durable
        out/                        what becomes <parent>/<out>: shards as `<file>.part`, side files as they are

It alone creates, writes, renames and deletes below the target's parent. It knows rows only as ranges of bytes in
shards: what fills them is the caller's, who asks for the memory of a range (`memory`), fills and hashes it, says so
(`filled`), and names the digest of a whole row (`row_done`), from any thread, in any order. `publish` makes it a folder.

**Extents.** A shard is cut every 4 MiB of file offset. Rows follow each other without gaps and so are not aligned, but
extents are: the caller fills the extent's own page-aligned memory, and a full extent is written with O_DIRECT, which
was measured several times faster than the page cache and an fsync, costs no copy, and leaves the cache to the inputs.
The last extent of a shard is written padded to 4 KiB and the file cut to its size before it is renamed, so that no file
is written through the cache and around it at once. Where O_DIRECT is refused the same writes go through the cache.

Memory is bounded: buffers come from a pool. When it is empty a caller waits while writes are under way; when none is,
every buffer is held by an extent with holes, and the oldest one that nobody is filling is written as it is, to be read
back when the rest of it comes (whatever is on disk already, from that or from a run before, is read back before an
extent is filled on). Only when all of them are being filled at this moment an extra buffer is made: so nobody waits for
something that only he can bring about.

**Nothing is named before it is durable.** A row goes into the journal when the extents under it are written and
`fdatasync`ed, every 256 MB or 5 s: no system call belongs to a row, and a crash costs what came since. A run that
starts over a journal hashes the rows it names again and takes only those that are equal.

**All or nothing.** Claim and journal (see `claim` and `journal`) lie beside `out/`, not in it: they hold until the
rename is done and what was replaced is deleted, and the published folder never contains either.
"""

from mergeflow.manifest import MANIFEST
from mergeflow.writing.disk import free_bytes
from mergeflow.writing.journal import Finished
from mergeflow.writing.staging import Staging
from mergeflow.writing.target import finished_digest, refuse, repair

__all__ = ["MANIFEST", "Finished", "Staging", "finished_digest", "free_bytes", "refuse", "repair"]
