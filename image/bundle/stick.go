package bundle

func (b *builder) stickSteps() []step { return nil }

func (b *builder) checkStick() error { return nil }
