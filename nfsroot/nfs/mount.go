package nfs

import (
	"path"
	"strings"
)

// The MOUNT protocol, version 3 (RFC 1813 appendix I), on the port of NFS. It
// hands out the first file handle and nothing else: the server keeps no table
// of mounts, so DUMP is always empty.

const progMount = 100005

const maxPath = 1024 // MNTPATHLEN

var mountNames = [...]string{"NULL", "MNT", "DUMP", "UMNT", "UMNTALL", "EXPORT"}

var mountProcs = [len(mountNames)]procedure{
	{name: "MOUNT.NULL", run: (*call).null},
	{name: "MOUNT.MNT", run: (*call).mnt},
	{name: "MOUNT.DUMP", run: func(c *call, d *decoder, e *buffer) bool { e.boolean(false); return true }},
	{name: "MOUNT.UMNT", run: func(c *call, d *decoder, e *buffer) bool { d.opaque(maxPath); return !d.bad }},
	{name: "MOUNT.UMNTALL", run: (*call).null},
	{name: "MOUNT.EXPORT", run: (*call).listExports},
}

// mnt answers with the handle of an export or of a directory in one. The path
// is walked by name in the export: `..` and symbolic links lead nowhere.
func (c *call) mnt(d *decoder, e *buffer) bool {
	p := string(d.opaque(maxPath))
	if d.bad {
		return false
	}
	f, st := c.mountPoint(p)
	e.u32(uint32(c.note(st))) // the mountstat3 values used are those of nfsstat3
	if st != ok {
		return true
	}
	e.opaque(f.handle())
	e.u32(1) // flavors
	e.u32(flavorSys)
	return true
}

func (c *call) mountPoint(p string) (*file, status) {
	if !strings.HasPrefix(p, "/") || strings.Contains(p, "\x00") {
		return nil, errNoEnt
	}
	for _, name := range strings.Split(p, "/") {
		if name == ".." {
			return nil, errAcces
		}
	}
	p = path.Clean(p)
	for _, x := range c.srv.exports { // longest path first
		rest, inside := strings.CutPrefix(p, x.Path)
		if !inside || rest != "" && x.Path != "/" && rest[0] != '/' {
			continue
		}
		f := c.hold(c.srv.files.get(x, x.root.h, kindDir))
		for name := range strings.SplitSeq(rest, "/") {
			if name == "" {
				continue
			}
			fd, err := f.fd()
			if err != nil {
				return nil, statusOf(err)
			}
			h, err := f.handleOf(fd, name)
			if err != nil {
				return nil, statusOf(err)
			}
			f = c.hold(c.srv.files.get(x, h, 0))
			if f.handle() == nil {
				return nil, errStale
			}
			if f.kind() != kindDir {
				return nil, errNotDir
			}
		}
		return f, ok
	}
	return nil, errNoEnt
}

// listExports answers EXPORT: every export, for everyone the server admits.
func (c *call) listExports(_ *decoder, e *buffer) bool {
	for _, x := range c.srv.exports {
		e.boolean(true)
		e.str(x.Path)
		e.boolean(false) // groups
	}
	e.boolean(false)
	return true
}
