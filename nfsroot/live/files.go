package live

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"krgimage/nfsroot/meta"
)

// The live root is written by every node's root user, so the head never trusts
// its symbolic links: all access goes through a meta.Root.

// replaceFile puts a file in place, written aside and renamed. A file that
// already has this content, mode and owner is left alone, so that nodes keep
// their cached copy.
func replaceFile(root meta.Root, name string, data []byte, mode fs.FileMode, uid, gid int) error {
	if info, err := root.Lstat(name); err == nil && info.Mode() == mode && owner(info) == [2]int{uid, gid} {
		if old, err := root.ReadFile(name); err == nil && bytes.Equal(old, data) {
			return nil
		}
	}
	aside := path.Join(path.Dir(name), ".krgimage-new-"+path.Base(name))
	if err := root.RemoveAll(aside); err != nil {
		return err
	}
	if err := writeNew(root, aside, data, mode, uid, gid); err != nil {
		root.Remove(aside)
		return err
	}
	if err := root.Rename(aside, name); err != nil {
		root.Remove(aside)
		return err
	}
	return nil
}

func writeNew(root meta.Root, name string, data []byte, mode fs.FileMode, uid, gid int) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := root.Lchown(name, uid, gid); err != nil {
		return err
	}
	if err := root.Chmod(name, mode); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

// replaceLink makes name a symbolic link to target, whatever it was, unless it
// is a directory.
func replaceLink(root meta.Root, target, name string) error {
	if old, err := root.Readlink(name); err == nil && old == target {
		return nil
	}
	aside := path.Join(path.Dir(name), ".krgimage-new-"+path.Base(name))
	if err := root.RemoveAll(aside); err != nil {
		return err
	}
	if err := root.Symlink(target, aside); err != nil {
		return err
	}
	if err := root.Rename(aside, name); err != nil {
		root.Remove(aside)
		return err
	}
	return nil
}

// makeDir makes a directory of root's, or sets the mode of the one there.
func makeDir(root meta.Root, name string, mode fs.FileMode) error {
	if err := root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := root.Lstat(name)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("/%s of the live root is not a directory", name)
	}
	if owner(info) != [2]int{0, 0} {
		if err := root.Lchown(name, 0, 0); err != nil {
			return err
		}
	}
	if info.Mode() != mode|fs.ModeDir {
		return root.Chmod(name, mode)
	}
	return nil
}

func exists(root meta.Root, name string) (bool, error) {
	_, err := root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
