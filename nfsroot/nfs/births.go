package nfs

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxBirths bounds the files that births remembers, in each of its two halves.
const maxBirths = 32 << 10

// birthAge is how old a file must be to be remembered.
const birthAge = 2 * time.Second

// births remembers the wire handles of files by inode number and time of birth,
// so that a listing needs one system call an entry instead of two and no MAC.
//
// An inode number is used again, with another generation and so another handle,
// but not for a file with the same birth: that of the next one is later than the
// end of the one before, and a file is remembered only when its own birth is
// longer ago than any file system's clock tick.
//
// It holds the newest files: when the one half is full, the other is emptied and
// takes its place.
type births struct {
	mu       sync.Mutex
	now, old map[birth]string // guarded by mu
}

type birth struct {
	x         *export
	ino       uint64
	sec, nsec int64
}

// get returns the wire handle of a file, nil when it is not known.
func (b *births) get(k birth) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	wire, found := b.now[k]
	if !found {
		if wire, found = b.old[k]; !found {
			return nil
		}
		b.put(k, wire)
	}
	return []byte(wire)
}

func (b *births) add(k birth, wire []byte) {
	if time.Since(time.Unix(k.sec, k.nsec)) < birthAge {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.put(k, string(wire))
}

// put is add with mu held.
func (b *births) put(k birth, wire string) {
	if b.now == nil || len(b.now) >= maxBirths {
		b.old, b.now = b.now, make(map[birth]string)
	}
	b.now[k] = wire
}

// statBirth reads the attributes of a name in a directory, and who it is if the
// file system knows when its files were born.
func statBirth(x *export, dirfd int, name string, st *unix.Stat_t) (k birth, known bool, err error) {
	var sx unix.Statx_t
	err = unix.Statx(dirfd, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &sx)
	if err != nil {
		return k, false, err
	}
	at := func(t unix.StatxTimestamp) unix.Timespec { return unix.Timespec{Sec: t.Sec, Nsec: int64(t.Nsec)} }
	*st = unix.Stat_t{
		Dev: unix.Mkdev(sx.Dev_major, sx.Dev_minor), Ino: sx.Ino, Nlink: uint64(sx.Nlink), Mode: uint32(sx.Mode),
		Uid: sx.Uid, Gid: sx.Gid, Rdev: unix.Mkdev(sx.Rdev_major, sx.Rdev_minor), Size: int64(sx.Size),
		Blksize: int64(sx.Blksize), Blocks: int64(sx.Blocks), Atim: at(sx.Atime), Mtim: at(sx.Mtime), Ctim: at(sx.Ctime),
	}
	return birth{x, sx.Ino, sx.Btime.Sec, int64(sx.Btime.Nsec)}, sx.Mask&unix.STATX_BTIME != 0, nil
}
