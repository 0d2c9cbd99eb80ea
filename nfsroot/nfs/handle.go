package nfs

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A file handle on the wire:
//
//	0      version (1)
//	1      kind: the file's type bits (st_mode >> 12)
//	2..5   export id
//	6..9   kernel handle type (name_to_handle_at)
//	10..   kernel handle, up to 38 bytes
//	last   16 bytes of HMAC-SHA256 over all that comes before
//
// Nothing in it depends on names, on time or on the server's memory. The kernel
// handle holds inode and generation number, so it dies with the file and not
// before. The MAC keeps clients from naming files they were never shown; the
// export id is under it too, so a handle is of no use in another export.
const (
	handleVersion = 1
	handleHead    = 10
	handleMAC     = 16
	maxHandle     = 64 // NFS3_FHSIZE
)

// kind is a file's type: st_mode's type bits, shifted down.
type kind uint8

const (
	kindFIFO   kind = unix.S_IFIFO >> 12
	kindChar   kind = unix.S_IFCHR >> 12
	kindDir    kind = unix.S_IFDIR >> 12
	kindBlock  kind = unix.S_IFBLK >> 12
	kindReg    kind = unix.S_IFREG >> 12
	kindLink   kind = unix.S_IFLNK >> 12
	kindSocket kind = unix.S_IFSOCK >> 12
)

func kindOf(mode uint32) kind { return kind((mode & unix.S_IFMT) >> 12) }

// kernelHandle is a struct file_handle without its length, as a comparable
// value: four bytes of type in the machine's order of the wire, then the bytes.
type kernelHandle string

// fileHandle is a struct file_handle with room for any handle that fits ours.
type fileHandle struct {
	size uint32
	typ  int32
	data [128]byte // MAX_HANDLE_SZ
}

// handleAt asks the kernel for the handle of name in the directory dirfd, or of
// dirfd itself when name is empty. A symbolic link is not followed. (x/sys asks
// twice, first for the size.)
func handleAt(dirfd int, name string) (kernelHandle, error) {
	h, _, err := handleAndMount(dirfd, name)
	return h, err
}

// handleAndMount is handleAt with the id of the mount that the file is on.
func handleAndMount(dirfd int, name string) (kernelHandle, int32, error) {
	flags := 0
	if name == "" {
		flags = unix.AT_EMPTY_PATH
	}
	var path [256]byte
	if len(name) >= len(path) {
		return "", 0, unix.ENAMETOOLONG
	}
	copy(path[:], name)
	h := fileHandle{size: uint32(len(fileHandle{}.data))}
	var mount int32
	_, _, e := unix.Syscall6(unix.SYS_NAME_TO_HANDLE_AT, uintptr(dirfd), uintptr(unsafe.Pointer(&path[0])),
		uintptr(unsafe.Pointer(&h)), uintptr(unsafe.Pointer(&mount)), uintptr(flags), 0)
	if e != 0 {
		return "", 0, e
	}
	if handleHead+int(h.size)+handleMAC > maxHandle {
		return "", 0, unix.EOVERFLOW
	}
	var b [maxHandle]byte
	binary.BigEndian.PutUint32(b[:], uint32(h.typ))
	return kernelHandle(b[:4+copy(b[4:], h.data[:h.size])]), mount, nil
}

// names tells whether the handle is that of a file with the inode number: false
// too where the type of handle does not say (include/linux/exportfs.h).
func (h kernelHandle) names(ino uint64) bool {
	if len(h) < 12 {
		return false
	}
	b := []byte(h[4:12])
	switch typ := binary.BigEndian.Uint32([]byte(h[:4])); {
	case typ == 0x01 && len(h) == 4+8: // FILEID_INO32_GEN: ext4, xfs
		return uint64(binary.NativeEndian.Uint32(b)) == ino
	case typ == 0x01 && len(h) == 4+12: // tmpfs: generation, inode
		return binary.NativeEndian.Uint64([]byte(h[8:16])) == ino
	case typ == 0x81, typ == 0x4d: // xfs with large inode numbers, btrfs
		return binary.NativeEndian.Uint64(b) == ino
	}
	return false
}

// open opens the file that the handle names on the mount.
func (h kernelHandle) open(mount, flags int) (int, error) {
	typ := int32(binary.BigEndian.Uint32([]byte(h[:4])))
	return unix.OpenByHandleAt(mount, unix.NewFileHandle(typ, []byte(h[4:])), flags|unix.O_CLOEXEC|unix.O_NOFOLLOW)
}

// seal makes the wire handle of a file.
func (s *Server) seal(x *export, k kind, h kernelHandle) []byte {
	b := make([]byte, 0, maxHandle)
	b = append(b, handleVersion, byte(k))
	b = binary.BigEndian.AppendUint32(b, x.id)
	b = append(b, h...)
	var sum [sha256.Size]byte
	return append(b, s.mac(sum[:0], b)[:handleMAC]...)
}

// resolve turns a wire handle into a referenced file; the caller releases it.
func (s *Server) resolve(wire []byte) (*file, status) {
	if len(wire) < handleHead+handleMAC || wire[0] != handleVersion {
		s.count.badHandles.Add(1)
		return nil, errBadHandle
	}
	signed, sum := wire[:len(wire)-handleMAC], wire[len(wire)-handleMAC:]
	x := s.exportByID(binary.BigEndian.Uint32(signed[2:]))
	if x == nil {
		s.count.badHandles.Add(1)
		return nil, errStale
	}
	h := signed[6:]
	if f := s.files.cached(x, h); f != nil {
		// A cached file's own handle is known: no need to compute the MAC.
		if subtle.ConstantTimeCompare(f.handle(), wire) == 1 {
			return f, ok
		}
		f.release()
		s.count.badHandles.Add(1)
		return nil, errStale
	}
	var want [sha256.Size]byte
	if subtle.ConstantTimeCompare(s.mac(want[:0], signed)[:handleMAC], sum) != 1 {
		// A wrong MAC is what a client of a server with another key sends, too:
		// ESTALE is what its programs understand.
		s.count.badHandles.Add(1)
		return nil, errStale
	}
	return s.files.get(x, kernelHandle(h), kind(wire[1])), ok
}
