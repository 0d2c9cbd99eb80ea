package posix

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func attributeChecks() []check {
	return []check{
		{"chmod", chmod}, {"umask", umask}, {"chown", chown}, {"setuid bits", setuidBits},
		{"times", times}, {"utimensat", utimensat}, {"links", linkCounts}, {"mknod", mknod}, {"statfs", statfs},
	}
}

func chmod(t *T) {
	for _, kind := range []string{"file", "directory", "fifo", "socket", "block", "char"} {
		t.sub(kind, func(t *T) {
			p := t.path("x")
			t.must(t.make(kind, p))
			for _, mode := range []uint32{0, 0o111, 0o222, 0o444, 0o640, 0o777, 0o1755, 0o2755, 0o4755, 0o7777} {
				t.errno(fmt.Sprintf("%04o", mode), unix.Chmod(p, mode), 0)
				t.is(fmt.Sprintf("mode after %04o", mode), t.stat(p).Mode, kindBits[kind]|mode)
			}
			t.as(bob, func() { t.errno("by another", unix.Chmod(p, 0o777), unix.EPERM) })
			t.must(unix.Chown(p, bob.uid, sharedGroup))
			t.as(bob, func() { t.errno("by the owner", unix.Chmod(p, 0o700), 0) })
			t.as(bob, func() { t.errno("set-group-id of a group that isn't the owner's", unix.Chmod(p, 0o2770), 0) })
			t.is("the bit is dropped", t.stat(p).Mode&0o7777, uint32(0o770))
			t.as(identity{bob.uid, sharedGroup, nil}, func() { t.errno("of one's own group", unix.Chmod(p, 0o2770), 0) })
			t.is("the bit stays", t.stat(p).Mode&0o7777, uint32(0o2770))
			t.as(identity{bob.uid, bob.gid, []uint32{sharedGroup}}, func() { t.errno("of a supplementary group", unix.Chmod(p, 0o2750), 0) })
			t.is("the bit stays too", t.stat(p).Mode&0o7777, uint32(0o2750))
		})
	}
	p := t.file("f", "", 0o644)
	t.must(unix.Symlink("f", t.path("l")))
	t.errno("through a link", unix.Chmod(t.path("l"), 0o600), 0)
	t.is("mode of the file", t.stat(p).Mode&0o7777, uint32(0o600))
	t.is("mode of the link", t.lstat(t.path("l")).Mode&0o7777, uint32(0o777))
	fd, err := unix.Open(p, unix.O_RDONLY, 0)
	if t.ok("open", err) {
		t.errno("fchmod", unix.Fchmod(fd, 0o4711), 0)
		t.is("mode by descriptor", fstat(fd).Mode&0o7777, uint32(0o4711))
		unix.Close(fd)
	}
}

func fstat(fd int) (st unix.Stat_t) { _ = unix.Fstat(fd, &st); return st }

// umask: the modes of what is made.
func umask(t *T) {
	for _, mask := range []int{0, 0o022, 0o027, 0o077, 0o777} {
		for _, mode := range []uint32{0o666, 0o777, 0o1777, 0o7777} {
			t.sub(fmt.Sprintf("%03o/%04o", mask, mode), func(t *T) {
				done := make(chan bool)
				t.must(unix.Chmod(t.dir, 0o777))
				t.as(bob, func() {
					defer close(done)
					t.must(unix.Unshare(unix.CLONE_FS)) // a umask of the thread's own
					unix.Umask(mask)
					fd, err := unix.Open(t.path("f"), unix.O_CREAT|unix.O_RDWR, mode)
					t.ok("open", err)
					unix.Close(fd)
					t.ok("mkdir", unix.Mkdir(t.path("d"), mode))
					t.ok("mkfifo", unix.Mkfifo(t.path("p"), mode))
					t.ok("mknod", unix.Mknod(t.path("n"), unix.S_IFREG|mode, 0))
					t.ok("socket", unix.Mknod(t.path("s"), unix.S_IFSOCK|mode, 0))
				})
				<-done
				want := mode &^ uint32(mask)
				for _, name := range []string{"f", "p", "n", "s"} {
					t.is("mode of "+name, t.lstat(t.path(name)).Mode&0o7777, want)
				}
				t.is("mode of d", t.lstat(t.path("d")).Mode&0o7777&^unix.S_ISGID, want&^(unix.S_ISGID|unix.S_ISUID))
			})
		}
	}
}

// chown: who may give what to whom.
func chown(t *T) {
	member := identity{alice.uid, alice.gid, []uint32{sharedGroup}}
	for _, kind := range kinds {
		for _, row := range []struct {
			name     string
			by       identity
			uid, gid int
			want     unix.Errno
		}{
			{"root gives away", identity{}, bob.uid, bob.gid, 0},
			{"root, owner only", identity{}, bob.uid, -1, 0},
			{"root, group only", identity{}, -1, bob.gid, 0},
			{"root, large ids", identity{}, 1<<31 - 1, 1<<31 - 1, 0},
			{"owner gives away", alice, bob.uid, -1, unix.EPERM},
			{"owner, own id", alice, alice.uid, -1, 0},
			{"owner, own group", alice, -1, alice.gid, 0},
			{"owner, both own", alice, alice.uid, alice.gid, 0},
			{"owner, supplementary group", member, -1, sharedGroup, 0},
			{"owner, both, supplementary group", member, alice.uid, sharedGroup, 0},
			{"owner, foreign group", alice, -1, bob.gid, unix.EPERM},
			{"owner, foreign group and own id", alice, alice.uid, sharedGroup, unix.EPERM},
			{"owner, nothing", alice, -1, -1, 0},
			{"other takes", bob, bob.uid, -1, unix.EPERM},
			{"other, own group", bob, -1, bob.gid, unix.EPERM},
			{"other, what it is", bob, alice.uid, -1, unix.EPERM},
			{"other, nothing", bob, -1, -1, 0},
		} {
			t.sub(kind+"/"+row.name, func(t *T) {
				p := t.path("x")
				t.must(t.make(kind, p))
				t.must(unix.Lchown(p, alice.uid, alice.gid))
				do := func() { t.errno("result", unix.Lchown(p, row.uid, row.gid), row.want) }
				if row.by.uid == 0 {
					do()
				} else {
					t.as(row.by, do)
				}
				st, uid, gid := t.lstat(p), alice.uid, alice.gid
				if row.want == 0 {
					if row.uid >= 0 {
						uid = row.uid
					}
					if row.gid >= 0 {
						gid = row.gid
					}
				}
				t.is("owner", []uint32{st.Uid, st.Gid}, []uint32{uint32(uid), uint32(gid)})
			})
		}
	}
	p := t.file("f", "", 0o644)
	t.must(unix.Symlink("f", t.path("l")))
	t.errno("through a link", unix.Chown(t.path("l"), 7, 8), 0)
	t.is("owner of the file", t.stat(p).Uid, uint32(7))
	t.is("owner of the link", t.lstat(t.path("l")).Uid, uint32(0))
}

// setuidBits: what takes the set-user-id and set-group-id bits away.
func setuidBits(t *T) {
	writer := bob
	for _, row := range []struct {
		name       string
		mode, want uint32
		run        func(p string) error
	}{
		{"chown by the owner", 0o6755, 0o755, func(p string) error { return unix.Chown(p, -1, alice.gid) }},
		{"chown to what it is", 0o6755, 0o755, func(p string) error { return unix.Chown(p, alice.uid, -1) }},
		{"chown without group execution", 0o6745, 0o2745, func(p string) error { return unix.Chown(p, -1, alice.gid) }},
		{"write by another", 0o6777, 0o777, func(p string) error { return writeAt(p, "x", 0) }},
		{"write, set-user-id only", 0o4777, 0o777, func(p string) error { return writeAt(p, "x", 0) }},
		{"write, set-group-id only", 0o2777, 0o777, func(p string) error { return writeAt(p, "x", 0) }},
		{"truncate by another", 0o6777, 0o777, func(p string) error { return unix.Truncate(p, 1) }},
		{"truncate at open", 0o6777, 0o777, func(p string) error { return open(p, unix.O_WRONLY|unix.O_TRUNC) }},
		{"read", 0o6777, 0o6777, func(p string) error { return open(p, unix.O_RDONLY) }},
		{"utimensat", 0o6777, 0o6777, func(p string) error { return unix.UtimesNanoAt(unix.AT_FDCWD, p, nil, 0) }},
	} {
		t.sub(row.name, func(t *T) {
			p := t.file("f", "text", 0o600)
			t.must(unix.Chown(p, alice.uid, alice.gid))
			t.must(unix.Chmod(p, row.mode))
			id := writer
			if strings.HasPrefix(row.name, "chown") {
				id = alice
			}
			t.as(id, func() { t.errno("result", row.run(p), 0) })
			t.is("mode", fmt.Sprintf("%04o", t.stat(p).Mode&0o7777), fmt.Sprintf("%04o", row.want))
		})
	}
	t.sub("rename and link keep them", func(t *T) {
		p := t.file("f", "", 0o6755)
		t.ok("rename", unix.Rename(p, t.path("g")))
		t.ok("link", unix.Link(t.path("g"), t.path("h")))
		t.is("mode", t.stat(t.path("h")).Mode&0o7777, uint32(0o6755))
	})
}

func writeAt(p, text string, off int64) error {
	fd, err := unix.Open(p, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = unix.Pwrite(fd, []byte(text), off)
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	return err
}

// times: which time stamps each operation moves, on success and on failure.
func times(t *T) {
	const a, m, c, dirM, dirC = "atime", "mtime", "ctime", "directory's mtime", "directory's ctime"
	rows := []struct {
		name  string
		kind  string
		run   func(t *T, p string) error
		fails bool
		moves []string
	}{
		{"chmod", "file", func(_ *T, p string) error { return unix.Chmod(p, 0o600) }, false, []string{c}},
		{"chown", "file", func(_ *T, p string) error { return unix.Chown(p, 5, 5) }, false, []string{c}},
		{"truncate", "file", func(_ *T, p string) error { return unix.Truncate(p, 1) }, false, []string{m, c}},
		{"write", "file", func(_ *T, p string) error { return writeAt(p, "abc", 0) }, false, []string{m, c}},
		{"open with truncation", "file", func(_ *T, p string) error { return open(p, unix.O_WRONLY|unix.O_TRUNC) }, false, []string{m, c}},
		{"open to write", "file", func(_ *T, p string) error { return open(p, unix.O_RDWR) }, false, nil},
		{"stat", "file", func(_ *T, p string) error { var st unix.Stat_t; return unix.Stat(p, &st) }, false, nil},
		{"link", "file", func(t *T, p string) error { return unix.Link(p, t.path("d/y")) }, false, []string{c, dirM, dirC}},
		{"create in it", "directory", func(_ *T, p string) error { return open(p+"/n", unix.O_CREAT|unix.O_WRONLY) }, false, []string{m, c}},
		{"mkdir in it", "directory", func(_ *T, p string) error { return unix.Mkdir(p+"/n", 0o755) }, false, []string{m, c}},
		{"mkfifo in it", "directory", func(_ *T, p string) error { return unix.Mkfifo(p+"/n", 0o755) }, false, []string{m, c}},
		{"symlink in it", "directory", func(_ *T, p string) error { return unix.Symlink("n", p+"/n") }, false, []string{m, c}},
		{"unlink", "file", func(_ *T, p string) error { return unix.Unlink(p) }, false, []string{dirM, dirC}},
		{"rmdir", "directory", func(_ *T, p string) error { return unix.Rmdir(p) }, false, []string{dirM, dirC}},
		{"rename", "file", func(t *T, p string) error { return unix.Rename(p, t.path("d/y")) }, false, []string{dirM, dirC}},
		{"failing mkdir", "directory", func(_ *T, p string) error { return unix.Mkdir(p, 0o755) }, true, nil},
		{"failing unlink", "directory", func(_ *T, p string) error { return unix.Unlink(p) }, true, nil},
		{"failing rmdir", "file", func(_ *T, p string) error { return unix.Rmdir(p) }, true, nil},
		{"failing rename", "file", func(t *T, p string) error { return unix.Rename(p, t.path("no/y")) }, true, nil},
		{"failing link", "file", func(t *T, p string) error { return unix.Link(p, p) }, true, nil},
		{"failing exclusive create", "file", func(_ *T, p string) error { return open(p, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR) }, true, nil},
	}
	type stamps map[string]unix.Timespec
	look := func(t *T) stamps {
		s := stamps{}
		var st unix.Stat_t
		if unix.Lstat(t.path("d/x"), &st) == nil {
			s[a], s[m], s[c] = st.Atim, st.Mtim, st.Ctim
		}
		st = t.stat(t.path("d"))
		s[dirM], s[dirC] = st.Mtim, st.Ctim
		return s
	}
	for _, row := range rows {
		t.sub(row.name, func(t *T) {
			t.mkdir("d", 0o755)
			p := t.path("d/x")
			if row.kind == "file" {
				t.file("d/x", "text", 0o644)
			} else {
				t.must(t.make(row.kind, p))
			}
			before := look(t)
			time.Sleep(tick)
			err := row.run(t, p)
			t.is("fails", err != nil, row.fails)
			after := look(t)
			moved := map[string]bool{}
			for _, w := range row.moves {
				moved[w] = true
			}
			for _, stamp := range []string{m, c, dirM, dirC} {
				was, is := before[stamp], after[stamp]
				if is == (unix.Timespec{}) || row.name == "rename" && stamp == c {
					continue // gone, or left to the file system by POSIX
				}
				t.is(stamp+" moves", is.Nano() > was.Nano(), moved[stamp])
			}
		})
	}
}

// tick is more than the coarsest clock that the kernel stamps files with.
const tick = 12 * time.Millisecond

func utimensat(t *T) {
	set := func(p string, at, mt unix.Timespec) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{at, mt}, unix.AT_SYMLINK_NOFOLLOW)
	}
	now, omit := unix.Timespec{Nsec: unix.UTIME_NOW}, unix.Timespec{Nsec: unix.UTIME_OMIT}
	for _, kind := range kinds {
		for _, when := range []unix.Timespec{
			{Sec: 0, Nsec: 1}, {Sec: 1, Nsec: 999999999}, {Sec: 1900000000, Nsec: 123456789}, {Sec: 1<<31 - 1}, {Sec: 1 << 31, Nsec: 5}, {Sec: 1<<32 - 1}, {Sec: 1 << 32},
		} {
			t.sub(fmt.Sprintf("%s/%d", kind, when.Sec), func(t *T) {
				p := t.path("x")
				t.must(t.make(kind, p))
				t.errno("result", set(p, when, unix.Timespec{Sec: when.Sec, Nsec: 7}), 0)
				st := t.lstat(p)
				if kind != "symlink" { // whose atime moves whenever somebody follows it
					t.is("atime", st.Atim, when)
				}
				t.is("mtime", st.Mtim, unix.Timespec{Sec: when.Sec, Nsec: 7})
			})
		}
	}
	for _, row := range []struct {
		name   string
		at, mt unix.Timespec
		by     identity
		mode   uint32
		want   unix.Errno
	}{
		{"owner sets", unix.Timespec{Sec: 5}, unix.Timespec{Sec: 6}, alice, 0o444, 0},
		{"owner, now", now, now, alice, 0o444, 0},
		{"owner, one of them", omit, unix.Timespec{Sec: 6}, alice, 0, 0},
		{"owner, the other", unix.Timespec{Sec: 6}, omit, alice, 0, 0},
		{"owner, neither", omit, omit, alice, 0, 0},
		{"writer sets", unix.Timespec{Sec: 5}, unix.Timespec{Sec: 6}, bob, 0o666, unix.EPERM},
		{"writer, now", now, now, bob, 0o666, 0},
		{"writer, one of them now", now, omit, bob, 0o666, unix.EPERM},
		{"writer, neither", omit, omit, bob, 0o666, 0},
		{"reader, now", now, now, bob, 0o644, unix.EACCES},
		{"reader sets", unix.Timespec{Sec: 5}, unix.Timespec{Sec: 6}, bob, 0o644, unix.EPERM},
		{"bad nanoseconds", unix.Timespec{Nsec: 1e9}, unix.Timespec{}, alice, 0o644, unix.EINVAL},
	} {
		t.sub(row.name, func(t *T) {
			p := t.file("f", "", 0o644)
			t.must(set(p, unix.Timespec{Sec: 1000}, unix.Timespec{Sec: 2000}))
			t.must(unix.Chown(p, alice.uid, alice.gid))
			t.must(unix.Chmod(p, row.mode))
			t.as(row.by, func() { t.errno("result", set(p, row.at, row.mt), row.want) })
			st := t.stat(p)
			check := func(what string, got, set unix.Timespec, was int64) {
				switch {
				case row.want != 0 || set == omit:
					t.is(what, got.Sec, was)
				case set == now:
					t.yes(what+" is today", got.Sec > 1e9)
				default:
					t.is(what, got.Sec, set.Sec)
				}
			}
			check("atime", st.Atim, row.at, 1000)
			check("mtime", st.Mtim, row.mt, 2000)
		})
	}
}

// linkCounts: nlink after each step.
func linkCounts(t *T) {
	for _, kind := range kinds {
		if kind == "directory" {
			continue
		}
		t.sub(kind, func(t *T) {
			a, b := t.path("a"), t.path("b")
			t.must(t.make(kind, a))
			t.is("new", uint64(t.lstat(a).Nlink), uint64(1))
			t.ok("link", unix.Link(a, b))
			t.is("linked", uint64(t.lstat(a).Nlink), uint64(2))
			t.is("inode", t.lstat(b).Ino, t.lstat(a).Ino)
			t.ok("chmod or chown", unix.Lchown(b, 12, 13))
			t.is("one inode, one owner", t.lstat(a).Uid, uint32(12))
			t.ok("unlink", unix.Unlink(a))
			t.is("unlinked", uint64(t.lstat(b).Nlink), uint64(1))
			t.ok("link back", unix.Link(b, a))
			t.ok("rename of a link over another of the same file", unix.Rename(a, b))
			t.is("does nothing", uint64(t.lstat(a).Nlink), uint64(2))
		})
	}
	d := t.mkdir("d", 0o755)
	t.is("empty directory", uint64(t.stat(d).Nlink), uint64(2))
	for i := range 3 {
		t.mkdir("d/"+itoa(i), 0o755)
		t.is("directories in it", uint64(t.stat(d).Nlink), uint64(3+i))
	}
	t.ok("rename away", unix.Rename(d+"/0", t.path("e")))
	t.is("after rename", uint64(t.stat(d).Nlink), uint64(4))
	t.ok("rmdir", unix.Rmdir(d+"/1"))
	t.is("after rmdir", uint64(t.stat(d).Nlink), uint64(3))
}

func mknod(t *T) {
	for _, kind := range kinds {
		p := t.path(kind)
		t.must(t.make(kind, p))
		t.is("kind of "+kind, t.lstat(p).Mode&unix.S_IFMT, kindBits[kind])
	}
	for _, dev := range []uint64{unix.Mkdev(1, 5), unix.Mkdev(255, 255), unix.Mkdev(259, 70000)} {
		p := t.path(fmt.Sprintf("dev%d", dev))
		t.ok("mknod", unix.Mknod(p, unix.S_IFCHR|0o600, int(dev)))
		t.is("device number", t.lstat(p).Rdev, dev)
	}
	t.must(unix.Chmod(t.dir, 0o777))
	t.as(bob, func() {
		t.errno("device by a user", unix.Mknod(t.path("no"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))), unix.EPERM)
		t.errno("block device by a user", unix.Mknod(t.path("no"), unix.S_IFBLK|0o600, int(unix.Mkdev(7, 0))), unix.EPERM)
		t.errno("FIFO by a user", unix.Mkfifo(t.path("fifo2"), 0o600), 0)
	})
	t.errno("directory by mknod", unix.Mknod(t.path("no"), unix.S_IFDIR|0o755, 0), unix.EPERM, unix.EINVAL)
}

func statfs(t *T) {
	var st unix.Statfs_t
	t.ok("statfs", unix.Statfs(t.dir, &st))
	t.yes("block size", st.Bsize > 0)
	t.yes("blocks", st.Blocks > 0 && st.Bfree <= st.Blocks && st.Bavail <= st.Bfree)
	t.yes("files", st.Files == 0 || st.Ffree <= st.Files)
	t.is("longest name", int(st.Namelen), nameMax)
}
