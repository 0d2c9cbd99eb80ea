package posix

import (
	"strings"

	"golang.org/x/sys/unix"
)

// Limits of names and paths in bytes: NAME_MAX, and PATH_MAX with its NUL.
const (
	nameMax = 255
	pathMax = 4096
)

func pathChecks() []check {
	return []check{{"path", badPaths}, {"name", longNames}, {"trailing slash", trailingSlash}, {"exists", exists}}
}

// prepare makes what an operation needs at p and beside it, and returns aux.
func (t *T) prepare(op operation, p string) (aux string) {
	aux = t.path("aux")
	if op.name == "link to" || op.name == "rename to" {
		t.must(t.make("file", aux))
	}
	if p != "" && op.needs != fresh {
		kind := "file"
		if op.dir {
			kind = "directory"
		}
		t.must(t.make(kind, p))
	}
	return aux
}

// badPaths: every operation on every kind of path that leads nowhere.
func badPaths(t *T) {
	for _, op := range operations {
		for _, row := range []struct {
			name string
			path func(*T) string
			want []unix.Errno
		}{
			{"missing directory", func(t *T) string { return t.path("no/x") }, []unix.Errno{unix.ENOENT}},
			{"empty path", func(t *T) string { return "" }, []unix.Errno{unix.ENOENT}},
			{"file as directory", func(t *T) string { return t.file("f", "", 0o644) + "/x" }, []unix.Errno{unix.ENOTDIR}},
			{"fifo as directory", func(t *T) string { t.must(t.make("fifo", t.path("f"))); return t.path("f/x") }, []unix.Errno{unix.ENOTDIR}},
			{"dangling link as directory", func(t *T) string { t.must(t.make("symlink", t.path("l"))); return t.path("l/x") }, []unix.Errno{unix.ENOENT}},
			{"link to itself as directory", func(t *T) string { t.must(unix.Symlink("l", t.path("l"))); return t.path("l/x") }, []unix.Errno{unix.ELOOP}},
			{"two links in a circle", func(t *T) string {
				t.must(unix.Symlink("m", t.path("l")))
				t.must(unix.Symlink("l", t.path("m")))
				return t.path("l/x")
			}, []unix.Errno{unix.ELOOP}},
			{"name of 256 bytes", func(t *T) string { return t.path(strings.Repeat("n", nameMax+1)) }, []unix.Errno{unix.ENAMETOOLONG}},
			{"directory name of 256 bytes", func(t *T) string { return t.path(strings.Repeat("n", nameMax+1) + "/x") }, []unix.Errno{unix.ENAMETOOLONG}},
			{"path of 4096 bytes", func(t *T) string { return longPath(t.dir, pathMax) }, []unix.Errno{unix.ENAMETOOLONG}},
		} {
			t.sub(op.name+"/"+row.name, func(t *T) {
				aux := t.prepare(op, "")
				t.errno("result", op.run(row.path(t), aux), row.want...)
			})
		}
		if op.needs != fresh {
			t.sub(op.name+"/missing file", func(t *T) {
				t.errno("result", op.run(t.path("no"), t.prepare(op, "")), unix.ENOENT)
			})
		}
	}
}

// longPath is a path of n bytes that names something in dir.
func longPath(dir string, n int) string {
	p := dir + strings.Repeat("/.", (n-len(dir)-2)/2)
	return p + strings.Repeat("/", n-len(p)-1) + "x"
}

// longNames: every operation with the longest names, and odd ones.
func longNames(t *T) {
	for _, op := range operations {
		for _, row := range []struct{ name, file string }{
			{"255 bytes", strings.Repeat("n", nameMax)},
			{"255 bytes of UTF-8", strings.Repeat("ü", nameMax/2) + "n"},
			{"not UTF-8", "\xff\xfe\x01"},
			{"newline and quotes", "a\n'\"\\ "},
			{"like an option", "-rf *"},
			{"three dots", "..."},
		} {
			t.sub(op.name+"/"+row.name, func(t *T) {
				p := t.path(row.file)
				aux := t.prepare(op, p)
				t.errno("result", op.run(p, aux), 0)
				var st unix.Stat_t
				want := unix.Errno(0)
				if op.needs == removing {
					want = unix.ENOENT
				}
				t.errno("after", unix.Lstat(p, &st), want)
			})
		}
		t.sub(op.name+"/path of 4095 bytes", func(t *T) {
			p := longPath(t.dir, pathMax-1)
			aux := t.prepare(op, p)
			t.errno("result", op.run(p, aux), 0)
		})
		t.sub(op.name+"/through 39 links", func(t *T) {
			t.mkdir("d", 0o755)
			t.must(unix.Symlink("d", t.path("l0")))
			for i := range 38 {
				t.must(unix.Symlink("l"+itoa(i), t.path("l"+itoa(i+1))))
			}
			p := t.path("l38/x")
			aux := t.prepare(op, p)
			t.errno("result", op.run(p, aux), 0)
		})
	}
}

// trailingSlash: a slash at the end asks for a directory.
func trailingSlash(t *T) {
	for _, op := range operations {
		if op.needs == fresh {
			continue
		}
		t.sub(op.name+"/file", func(t *T) {
			aux := t.prepare(op, "")
			t.errno("result", op.run(t.file("f", "", 0o644)+"/", aux), unix.ENOTDIR)
		})
	}
	t.errno("mkdir", unix.Mkdir(t.path("d")+"/", 0o755), 0)
	t.errno("rmdir", unix.Rmdir(t.path("d")+"/"), 0)
	t.errno("creat", open(t.path("d")+"/", unix.O_CREAT|unix.O_WRONLY), unix.EISDIR)
	t.errno("rmdir of dot", unix.Rmdir(t.path("")+"/."), unix.EINVAL)
	t.mkdir("e", 0o755)
	t.errno("rmdir of dot dot", unix.Rmdir(t.path("e")+"/.."), unix.ENOTEMPTY, unix.EEXIST)
	t.errno("unlink of dot", unix.Unlink(t.path("e")+"/."), unix.EISDIR, unix.EPERM)
	t.errno("rename of dot", unix.Rename(t.path("e")+"/.", t.path("f")), unix.EBUSY, unix.EINVAL)
	t.errno("rename to dot dot", unix.Rename(t.path("e"), t.path("e")+"/.."), unix.EBUSY, unix.EINVAL)
}

// exists: what makes a name refuses each kind of file that has it.
func exists(t *T) {
	for _, op := range operations {
		if op.needs != fresh || op.name == "open O_CREAT" || op.name == "rename to" {
			continue
		}
		for _, kind := range kinds {
			t.sub(op.name+"/"+kind, func(t *T) {
				p := t.path("x")
				aux := t.prepare(op, p)
				t.must(t.make(kind, p))
				t.errno("result", op.run(p, aux), unix.EEXIST)
				t.is("kind afterwards", t.lstat(p).Mode&unix.S_IFMT, kindBits[kind])
			})
		}
	}
}
