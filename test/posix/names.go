package posix

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

func nameChecks() []check {
	return []check{
		{"link", link}, {"symlink", symlink}, {"rename", rename}, {"rename2", rename2}, {"rename/open", renameOpen},
		{"rename/directories", renameDirectories}, {"unlink", unlink}, {"unlink/open", unlinkOpen}, {"rmdir", rmdir},
		{"readdir", readdir}, {"readdir/changes", readdirChanges}, {"working directory", workingDirectory},
	}
}

func link(t *T) {
	t.mkdir("d", 0o755)
	t.errno("of a directory", unix.Link(t.path("d"), t.path("e")), unix.EPERM)
	t.must(unix.Symlink("missing", t.path("l")))
	t.errno("of a dangling link", unix.Link(t.path("l"), t.path("m")), 0)
	t.is("is the link itself", t.lstat(t.path("m")).Mode&unix.S_IFMT, uint32(unix.S_IFLNK))
	t.errno("following a dangling link", unix.Linkat(unix.AT_FDCWD, t.path("l"), unix.AT_FDCWD, t.path("n"), unix.AT_SYMLINK_FOLLOW), unix.ENOENT)
	t.errno("to another file system", unix.Link(t.path("l"), "/dev/shm/krg-posix-link"), unix.EXDEV)
	f := t.file("f", "text", 0o600)
	t.ok("link", unix.Link(f, t.path("g")))
	t.must(writeAt(t.path("g"), "TEXT", 0))
	t.is("content by the other name", read(f), "TEXT")
	for i := range 200 {
		if !t.ok("many links", unix.Link(f, t.path("many"+itoa(i)))) {
			break
		}
	}
	t.is("count of many", uint64(t.stat(f).Nlink), uint64(202))
}

func read(p string) string {
	b, err := os.ReadFile(p)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func symlink(t *T) {
	for _, n := range []int{1, 59, 60, 61, 255, 1000, 4000, pathMax - 1} {
		target := strings.Repeat("t", n)
		p := t.path("l" + itoa(n))
		t.errno(fmt.Sprintf("target of %d bytes", n), unix.Symlink(target, p), 0)
		got, err := os.Readlink(p)
		t.ok("readlink", err)
		t.is("target", got, target)
		t.is("size", t.lstat(p).Size, int64(n))
	}
	t.errno("target of 4096 bytes", unix.Symlink(strings.Repeat("t", pathMax), t.path("no")), unix.ENAMETOOLONG)
	t.errno("empty target", unix.Symlink("", t.path("no")), unix.ENOENT)
	buf := make([]byte, 8)
	f := t.file("f", "text", 0o600)
	_, err := unix.Readlink(f, buf)
	t.errno("readlink of a file", err, unix.EINVAL)
	_, err = unix.Readlink(t.path("no"), buf)
	t.errno("readlink of nothing", err, unix.ENOENT)
	n, err := unix.Readlink(t.path("l255"), buf)
	t.ok("readlink into little", err)
	t.is("is cut", n, 8)
	t.must(unix.Symlink("f", t.path("s")))
	t.is("read through", read(t.path("s")), "text")
	t.errno("O_NOFOLLOW", open(t.path("s"), unix.O_NOFOLLOW), unix.ELOOP)
	t.errno("O_CREAT|O_EXCL", open(t.path("s"), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY), unix.EEXIST)
	t.must(unix.Symlink("made", t.path("dangling")))
	t.errno("O_CREAT through a dangling link", open(t.path("dangling"), unix.O_CREAT|unix.O_WRONLY), 0)
	t.is("makes the target", t.lstat(t.path("made")).Mode&unix.S_IFMT, uint32(unix.S_IFREG))
}

// rename: each kind over each kind.
func rename(t *T) {
	targets := append([]string{"nothing", "full directory"}, kinds...)
	for _, from := range kinds {
		for _, to := range targets {
			t.sub(from+" over "+to, func(t *T) {
				a, b := t.path("a"), t.path("b")
				t.must(t.make(from, a))
				switch to {
				case "nothing":
				case "full directory":
					t.mkdir("b", 0o755)
					t.file("b/x", "", 0o600)
				default:
					t.must(t.make(to, b))
				}
				ino := t.lstat(a).Ino
				var want []unix.Errno
				isDir := from == "directory"
				switch {
				case to == "nothing" || isDir == (to == "directory") && to != "full directory":
					want = []unix.Errno{0}
				case to == "full directory" && isDir:
					want = []unix.Errno{unix.ENOTEMPTY, unix.EEXIST}
				case isDir:
					want = []unix.Errno{unix.ENOTDIR}
				default:
					want = []unix.Errno{unix.EISDIR}
				}
				t.errno("result", unix.Rename(a, b), want...)
				var st unix.Stat_t
				if want[0] == 0 {
					t.errno("old name", unix.Lstat(a, &st), unix.ENOENT)
					t.is("inode", t.lstat(b).Ino, ino)
				} else {
					t.is("still there", t.lstat(a).Ino, ino)
				}
			})
		}
	}
	t.errno("to another file system", unix.Rename(t.file("f", "", 0o600), "/proc/x"), unix.EXDEV)
	t.errno("to itself", unix.Rename(t.path("f"), t.path("f")), 0)
	t.must(unix.Link(t.path("f"), t.path("g")))
	t.errno("to its own link", unix.Rename(t.path("f"), t.path("g")), 0)
	var st unix.Stat_t
	t.errno("both stay", unix.Lstat(t.path("f"), &st), 0)
}

// rename2: the flags of renameat2.
func rename2(t *T) {
	a, b := t.file("a", "a", 0o600), t.file("b", "b", 0o600)
	at := unix.AT_FDCWD
	t.errno("NOREPLACE over a file", unix.Renameat2(at, a, at, b, unix.RENAME_NOREPLACE), unix.EEXIST)
	t.errno("NOREPLACE", unix.Renameat2(at, a, at, t.path("c"), unix.RENAME_NOREPLACE), 0)
	t.errno("EXCHANGE", unix.Renameat2(at, b, at, t.path("c"), unix.RENAME_EXCHANGE), 0)
}

// renameOpen: open files stay what they are, whatever happens to names.
func renameOpen(t *T) {
	a, b := t.file("a", "content of a", 0o600), t.file("b", "content of b", 0o600)
	fa, err := unix.Open(a, unix.O_RDWR, 0)
	t.must(err)
	fb, err := unix.Open(b, unix.O_RDWR, 0)
	t.must(err)
	defer unix.Close(fa)
	t.ok("rename over an open file", unix.Rename(a, b))
	t.is("old content", preadAll(fb), "content of b")
	t.is("moved content", preadAll(fa), "content of a")
	t.is("content by name", read(b), "content of a")
	_, err = unix.Pwrite(fb, []byte("CONTENT"), 0)
	t.ok("write to the replaced file", err)
	t.ok("fsync of the replaced file", unix.Fsync(fb))
	t.is("what was written", preadAll(fb), "CONTENT of b")
	t.ok("fchmod of the replaced file", unix.Fchmod(fb, 0o644))
	t.ok("ftruncate of the replaced file", unix.Ftruncate(fb, 3))
	t.is("size", fstat(fb).Size, int64(3))
	t.is("links of the replaced file", uint64(fstat(fb).Nlink), uint64(0))
	t.ok("close", unix.Close(fb))
	t.is("the name has the new file", read(b), "content of a")
	t.is("only that is left", list(t.dir), []string{"b"})
}

func preadAll(fd int) string {
	buf := make([]byte, 1000)
	n, err := unix.Pread(fd, buf, 0)
	if err != nil {
		return err.Error()
	}
	return string(buf[:n])
}

func list(dir string) []string {
	es, err := os.ReadDir(dir)
	names := []string{}
	for _, e := range es {
		names = append(names, e.Name())
	}
	if err != nil {
		names = append(names, err.Error())
	}
	return names
}

func renameDirectories(t *T) {
	t.mkdir("a", 0o755)
	t.mkdir("a/b", 0o755)
	t.mkdir("a/b/c", 0o755)
	t.errno("below itself", unix.Rename(t.path("a"), t.path("a/x")), unix.EINVAL)
	t.errno("far below itself", unix.Rename(t.path("a"), t.path("a/b/c/x")), unix.EINVAL)
	t.errno("over its parent", unix.Rename(t.path("a/b"), t.path("a")), unix.ENOTEMPTY, unix.EEXIST)
	t.mkdir("z", 0o755)
	t.file("a/b/c/f", "deep", 0o600)
	d, err := unix.Open(t.path("a/b"), unix.O_PATH|unix.O_DIRECTORY, 0)
	t.must(err)
	defer unix.Close(d)
	up := t.stat(t.path("z")).Ino
	t.ok("to another directory", unix.Rename(t.path("a/b"), t.path("z/b")))
	t.is("what was in it", read(t.path("z/b/c/f")), "deep")
	var st unix.Stat_t
	t.ok("dot dot of it", unix.Fstatat(d, "..", &st, 0))
	t.is("is its new parent", st.Ino, up)
	t.ok("what is in it, by descriptor", unix.Fstatat(d, "c/f", &st, 0))
	// A user moves a directory only if it may write it: ".." changes.
	t.must(unix.Chmod(t.dir, 0o777))
	t.mkdir("mine", 0o777)
	t.mkdir("theirs", 0o755)
	t.must(unix.Chmod(t.path("mine"), 0o777))
	t.as(bob, func() {
		t.errno("of another's, to a new parent", unix.Rename(t.path("theirs"), t.path("mine/x")), unix.EACCES)
		t.errno("of another's, in its parent", unix.Rename(t.path("theirs"), t.path("others")), 0)
	})
}

func unlink(t *T) {
	for _, kind := range kinds {
		p := t.path(kind)
		t.must(t.make(kind, p))
		want := []unix.Errno{0}
		if kind == "directory" {
			want = []unix.Errno{unix.EISDIR, unix.EPERM}
		}
		t.errno(kind, unix.Unlink(p), want...)
	}
	t.must(unix.Symlink("directory", t.path("l")))
	t.errno("link to a directory", unix.Unlink(t.path("l")), 0)
	t.is("the directory stays", list(t.dir), []string{"directory"})
}

// unlinkOpen: a file without a name lives while it is open.
func unlinkOpen(t *T) {
	p := t.file("f", "content", 0o600)
	fd, err := unix.Open(p, unix.O_RDWR, 0)
	t.must(err)
	t.ok("unlink", unix.Unlink(p))
	t.errno("by name", open(p, unix.O_RDONLY), unix.ENOENT)
	t.is("read", preadAll(fd), "content")
	_, err = unix.Pwrite(fd, []byte("C"), 0)
	t.ok("write", err)
	t.ok("fsync", unix.Fsync(fd))
	t.ok("fchmod", unix.Fchmod(fd, 0o640))
	t.ok("fchown", unix.Fchown(fd, 3, 4))
	t.ok("ftruncate", unix.Ftruncate(fd, 5))
	st := fstat(fd)
	t.is("attributes", []int64{int64(st.Mode & 0o7777), int64(st.Uid), st.Size}, []int64{0o640, 3, 5})
	t.is("links", uint64(st.Nlink), uint64(0))
	t.is("read again", preadAll(fd), "Conte")
	t.must(t.make("file", p))
	t.yes("a new file of that name is another", t.stat(p).Ino != st.Ino)
	t.ok("close", unix.Close(fd))
	t.is("what is left", list(t.dir), []string{"f"})
}

func rmdir(t *T) {
	t.mkdir("d", 0o755)
	for _, kind := range kinds {
		t.must(t.make(kind, t.path("d/x")))
		t.errno("with a "+kind, unix.Rmdir(t.path("d")), unix.ENOTEMPTY, unix.EEXIST)
		t.must(os.Remove(t.path("d/x")))
	}
	for _, kind := range kinds {
		if kind == "directory" {
			continue
		}
		t.must(t.make(kind, t.path("x")))
		t.errno("of a "+kind, unix.Rmdir(t.path("x")), unix.ENOTDIR)
		t.must(os.Remove(t.path("x")))
	}
	t.must(unix.Symlink("d", t.path("l")))
	t.errno("of a link to a directory", unix.Rmdir(t.path("l")), unix.ENOTDIR)
	fd, err := unix.Open(t.path("d"), unix.O_RDONLY|unix.O_DIRECTORY, 0)
	t.must(err)
	defer unix.Close(fd)
	t.errno("of an open one", unix.Rmdir(t.path("d")), 0)
	var st unix.Stat_t
	t.errno("making a file in what is gone", unix.Mkdirat(fd, "x", 0o755), unix.ENOENT, unix.ESTALE)
	t.errno("looking in what is gone", unix.Fstatat(fd, "x", &st, 0), unix.ENOENT, unix.ESTALE)
}

// readdir: listings are whole, in pieces of every size, with types and inodes.
func readdir(t *T) {
	t.is("empty", list(t.dir), []string{})
	const n = 3000
	want := make([]string, n)
	d := t.mkdir("many", 0o755)
	for i := range n {
		want[i] = fmt.Sprintf("%04d-%s", i, strings.Repeat("x", i%200))
		if err := unix.Mknod(d+"/"+want[i], unix.S_IFREG|0o600, 0); err != nil {
			t.must(err)
			return
		}
	}
	t.yes("all at once", slices.Equal(list(d), want))
	f, err := os.Open(d)
	t.must(err)
	defer f.Close()
	for round := range 2 {
		var got []string
		for {
			names, err := f.Readdirnames(7)
			got = append(got, names...)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.must(err)
				break
			}
		}
		slices.Sort(got)
		t.yes(fmt.Sprintf("in pieces, round %d", round), slices.Equal(got, want))
		_, err := f.Seek(0, io.SeekStart)
		t.ok("rewind", err)
	}
	e := t.mkdir("kinds", 0o755)
	for _, kind := range kinds {
		t.must(t.make(kind, e+"/"+kind))
	}
	entries, err := os.ReadDir(e)
	t.ok("list of kinds", err)
	t.is("how many", len(entries), len(kinds))
	for _, entry := range entries {
		info, err := entry.Info()
		t.ok("info", err)
		if err == nil {
			t.is("type of "+entry.Name(), entry.Type(), info.Mode().Type())
		}
	}
	for _, dots := range []bool{true} {
		fd, err := unix.Open(e, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		t.must(err)
		buf := make([]byte, 8192)
		m, err := unix.Getdents(fd, buf)
		t.ok("getdents", err)
		t.is("dot and dot dot", strings.Contains(string(buf[:max(m, 0)]), "\x00..\x00") || strings.Contains(string(buf[:max(m, 0)]), "..\x00"), dots)
		unix.Close(fd)
	}
	_, err = unix.Getdents(-1, make([]byte, 100))
	t.errno("of no descriptor", err, unix.EBADF)
}

// readdirChanges: what is there all the time is listed once, whatever else comes
// and goes; a whole tree is removed while it is read.
func readdirChanges(t *T) {
	d := t.mkdir("d", 0o755)
	const n = 1500
	for i := range n {
		if err := unix.Mknod(fmt.Sprintf("%s/f%04d", d, i), unix.S_IFREG|0o600, 0); err != nil {
			t.must(err)
			return
		}
	}
	f, err := os.Open(d)
	t.must(err)
	defer f.Close()
	seen := map[string]int{}
	for step := 0; ; step++ {
		names, err := f.Readdirnames(50)
		for _, name := range names {
			seen[name]++
		}
		if err != nil {
			break
		}
		t.must(unix.Mknod(fmt.Sprintf("%s/new%04d", d, step), unix.S_IFREG|0o600, 0))
		_ = unix.Unlink(fmt.Sprintf("%s/f%04d", d, step*2)) // even ones go
	}
	missing, twice := 0, 0
	for i := 1; i < n; i += 2 {
		switch seen[fmt.Sprintf("f%04d", i)] {
		case 0:
			missing++
		case 1:
		default:
			twice++
		}
	}
	t.is("missing", missing, 0)
	t.is("twice", twice, 0)
	// As rm -r does: remove what each piece says, go on reading.
	_, err = f.Seek(0, io.SeekStart)
	t.must(err)
	for {
		names, err := f.Readdirnames(100)
		for _, name := range names {
			_ = unix.Unlink(d + "/" + name)
		}
		if err != nil {
			break
		}
	}
	t.errno("empty after removing while reading", unix.Rmdir(d), 0)
}

// workingDirectory: relative names go on working when the directory moves.
func workingDirectory(t *T) {
	t.mkdir("a", 0o755)
	t.file("a/f", "text", 0o600)
	fd, err := unix.Open(t.path("a"), unix.O_PATH|unix.O_DIRECTORY, 0)
	t.must(err)
	defer unix.Close(fd)
	t.ok("rename", unix.Rename(t.path("a"), t.path("b")))
	var st unix.Stat_t
	t.ok("relative stat", unix.Fstatat(fd, "f", &st, 0))
	t.ok("relative mkdir", unix.Mkdirat(fd, "d", 0o755))
	t.ok("dot", unix.Fstatat(fd, ".", &st, 0))
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	t.ok("its name", err)
	t.is("is the new one", link, t.path("b"))
}
