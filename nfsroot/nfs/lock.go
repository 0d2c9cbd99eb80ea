package nfs

import (
	"crypto/subtle"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/sunrpc"
)

// What the lock manager (nfsroot/nlm) asks of the file server.

// LockKey returns what names the file of a handle among all exports, for as
// long as the file exists and across restarts of the server, and whether the
// handle is one of this server's. It does not look at the file, which may be
// gone: its locks can be given back all the same.
func (s *Server) LockKey(wire []byte) (string, bool) {
	if len(wire) < handleHead+handleMAC || wire[0] != handleVersion {
		return "", false
	}
	signed, sum := wire[:len(wire)-handleMAC], wire[len(wire)-handleMAC:]
	x := s.exportByID(binary.BigEndian.Uint32(signed[2:]))
	if x == nil || subtle.ConstantTimeCompare(s.mac(nil, signed)[:handleMAC], sum) != 1 {
		return "", false
	}
	return x.Path + "\x00" + string(signed[6:]), true
}

// MayLock says whether a caller may lock a file: unix.ESTALE for one that is
// gone, unix.EROFS for an exclusive lock in a read-only export, unix.EINVAL for
// anything but a regular file, unix.EACCES. As with the kernel's server it takes
// the right to read the file, or to own it; here the right to write it serves
// for an exclusive lock, too.
func (s *Server) MayLock(wire []byte, caller sunrpc.Cred, exclusive bool) error {
	f, st := s.resolve(wire)
	if st != ok {
		return unix.ESTALE
	}
	defer f.release()
	if f.x.ReadOnly && exclusive {
		return unix.EROFS
	}
	var attr unix.Stat_t
	if err := f.stat(&attr); err != nil {
		return err
	}
	if kindOf(attr.Mode) != kindReg {
		return unix.EINVAL
	}
	id := identity{uid: caller.UID, gid: caller.GID}
	var groups []byte
	for _, g := range caller.Groups {
		groups = binary.NativeEndian.AppendUint32(groups, g)
	}
	id.groups = string(groups)
	if f.x.RootSquash {
		id = id.squash()
	}
	if id.uid == attr.Uid || f.permitted(id, &attr, mayRead) || exclusive && f.permitted(id, &attr, mayWrite) {
		return nil
	}
	return unix.EACCES
}
