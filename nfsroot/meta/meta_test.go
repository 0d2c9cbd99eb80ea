package meta

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	for _, a := range []Attr{
		{Mode: unix.S_IFREG | 0o644},
		{Mode: unix.S_IFREG | 0o6755, UID: 1<<32 - 1, GID: 42},
		{Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)},
		{Mode: unix.S_IFBLK | 0o660, GID: 6, Rdev: unix.Mkdev(259, 1<<20-1)},
		{Mode: unix.S_IFLNK | 0o777, UID: 1000, GID: 1000},
	} {
		text := a.Append(nil)
		got, err := Parse(text)
		if err != nil || got != a || len(text) > MaxText {
			t.Errorf("%q is read as %+v (%v), want %+v", text, got, err, a)
		}
	}
	for _, bad := range []string{"", "1", "2 100644 0 0", "1 100644 0", "1 100644 0 0 1 3", "1 20666 0 0", "1 100648 0 0", "1 644 0 0", "1 100644 -1 0", "1 100644  0", "1 1000100644 0 0", "1 100644 4294967296 0"} {
		if a, err := Parse([]byte(bad)); err == nil {
			t.Errorf("%q is read as %+v", bad, a)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("1 100644 0 0"))
	f.Add([]byte("1 20666 0 0 1 3"))
	f.Fuzz(func(t *testing.T, text []byte) {
		a, err := Parse(text)
		if err != nil {
			return
		}
		if again, err := Parse(a.Append(nil)); err != nil || again != a {
			t.Errorf("%q is %+v, and written again %+v (%v)", text, a, again, err)
		}
	})
}

// TestRoots does the same to a tree of either kind; only root can do it to a
// plain one.
func TestRoots(t *testing.T) {
	for _, kept := range []bool{false, true} {
		t.Run(fmt.Sprintf("kept=%v", kept), func(t *testing.T) {
			if !kept && os.Geteuid() != 0 {
				t.Skip("needs root")
			}
			top := t.TempDir()
			if err := Supported(top); err != nil {
				t.Skip(err)
			}
			parent, err := Open(top, kept)
			if err != nil {
				t.Fatal(err)
			}
			defer parent.Close()
			if err := parent.Mkdir("tree", 0o755); err != nil {
				t.Fatal(err)
			}
			if marked, err := Marked(filepath.Join(top, "tree")); marked != kept || err != nil {
				t.Errorf("marked: %v %v", marked, err)
			}
			root, err := parent.OpenRoot("tree")
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			testRoot(t, root)
			if _, err := os.Stat(filepath.Join(top, "outside")); err == nil {
				t.Error("a file was made outside")
			}
		})
	}
}

func testRoot(t *testing.T, root Root) {
	do := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	do("MkdirAll", root.MkdirAll("usr/lib/deep", 0o755))
	do("Symlink", root.Symlink("usr/lib", "lib"))
	do("Symlink", root.Symlink("../../lib/deep", "usr/lib/again"))
	do("Symlink", root.Symlink("/etc/passwd", "abs"))
	do("Symlink", root.Symlink("../outside", "out"))
	do("Symlink", root.Symlink("loop", "loop"))
	write := func(name, text string) {
		t.Helper()
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			t.Errorf("make %s: %v", name, err)
			return
		}
		f.WriteString(text)
		f.Close()
	}
	write("lib/deep/file", "text")
	do("Lchown", root.Lchown("lib/again/file", 12, 34))
	do("Chmod", root.Chmod("lib/deep/file", 0o755|fs.ModeSetuid))
	do("Link", root.Link("lib/deep/file", "lib/hard"))
	do("Mknod", root.Mknod("lib/fifo", unix.S_IFIFO|0o640, 0))
	do("Chtimes", root.Chtimes("lib/hard", time.Unix(5, 0), time.Unix(5, 0)))
	do("MkdirAll", root.MkdirAll("lib/more/dirs", 0o700))
	do("Rename", root.Rename("lib/more", "lib/most"))
	do("SetXattr", root.SetXattr("lib/hard", "user.test", []byte("x")))

	for _, tt := range []struct {
		name string
		mode fs.FileMode
	}{
		{"usr/lib/hard", 0o755 | fs.ModeSetuid}, {"lib", fs.ModeSymlink | 0o777}, {"usr", fs.ModeDir | 0o755},
		{"lib/fifo", fs.ModeNamedPipe | 0o640}, {"lib/most/dirs", fs.ModeDir | 0o700},
	} {
		info, err := root.Lstat(tt.name)
		if err != nil || info.Mode() != tt.mode {
			t.Errorf("%s: %v %v, want %v", tt.name, info, err, tt.mode)
		}
	}
	if info, err := root.Stat("lib/again/file"); err != nil || info.Size() != 4 || info.ModTime() != time.Unix(5, 0) {
		t.Errorf("Stat: %v %v", info, err)
	}
	if target, err := root.Readlink("usr/lib/again"); target != "../../lib/deep" || err != nil {
		t.Errorf("Readlink: %q %v", target, err)
	}
	if text, err := root.ReadFile("lib/again/file"); string(text) != "text" || err != nil {
		t.Errorf("ReadFile: %q %v", text, err)
	}
	for what, err := range map[string]error{
		"Mkdir of what is there": root.Mkdir("usr", 0o755),
		"ReadFile over abs":      second(root.ReadFile("abs")),
		"ReadFile over out":      second(root.ReadFile("out")),
		"ReadFile over loop":     second(root.ReadFile("loop")),
		"ReadFile of ..":         second(root.ReadFile("../outside")),
		"make outside":           second(root.OpenFile("out/file", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)),
		"Mkdir outside":          root.Mkdir("../outside", 0o755),
		"Rename outside":         root.Rename("usr", "../outside"),
		"Readlink of a file":     second(root.Readlink("lib/hard")),
		"Remove of a full one":   root.Remove("usr"),
	} {
		if err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	if _, err := root.Lstat("lib/deep/none/x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Lstat of nothing: %v", err)
	}
	var seen []string
	err := fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err == nil {
			_, err = d.Info()
		}
		seen = append(seen, d.Type().String()[:1]+name)
		return err
	})
	want := []string{"d.", "Labs", "Llib", "Lloop", "Lout", "dusr", "dusr/lib", "Lusr/lib/again", "dusr/lib/deep", "-usr/lib/deep/file",
		"pusr/lib/fifo", "-usr/lib/hard", "dusr/lib/most", "dusr/lib/most/dirs"}
	if err != nil || !slices.Equal(seen, want) {
		t.Errorf("WalkDir: %v %v\nwant %v", err, seen, want)
	}
	if names, err := fs.Glob(root.FS(), "usr/lib/h*"); err != nil || len(names) != 1 {
		t.Errorf("Glob: %v %v", names, err)
	}
	do("Remove", root.Remove("lib/fifo"))
	do("RemoveAll", root.RemoveAll("lib/deep"))
	do("RemoveAll", root.RemoveAll("usr"))
	do("RemoveAll", root.RemoveAll("none"))
	if _, err := root.Lstat("usr"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after RemoveAll: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }
